import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vision_ssl import plots
from vision_ssl.errors import DataError, MissingExtraError
from vision_ssl.report import Report


@pytest.fixture
def figures(
    monkeypatch: pytest.MonkeyPatch,
) -> list[Any]:  # matplotlib types what a figure holds too loosely to look into
    """The figures that the test draws, in order."""
    drawn: list[Any] = []
    save = plots._save

    def keep(figure: Figure, out: Any) -> Path:
        drawn.append(figure)
        return save(figure, out)

    monkeypatch.setattr(plots, "_save", keep)
    return drawn


def training(steps: int, looks_every: int = 0) -> list[dict[str, float]]:
    """Records of a run of 10 steps an epoch, whose loss falls by 0.01 a step."""
    records = []
    for step in range(1, steps + 1):
        records.append({"step": step, "epoch": step / 10, "loss": 9 - step / 100, "lr": step * 1e-3})
        if looks_every and step % looks_every == 0:
            look = {"effective_rank": step / 5, "knn_accuracy": step / 2, "linear_accuracy": step * 2}
            records.append({"step": step, "epoch": step // 10, **look})
    return records


def write_run(directory: Path, records: list[dict[str, float]]) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 100


def test_curves_of_a_run(tmp_path: Path, figures: list[Any]) -> None:
    run = write_run(tmp_path / "photos", training(40, looks_every=20))
    out = plots.curves(run, tmp_path / "new" / "curves.png")
    assert is_png(out)
    [figure] = figures
    assert figure.get_suptitle() == "photos: 40 steps, 4 epochs"
    loss, rate, accuracy, rank = figure.axes
    labels = ["loss", "learning rate", "accuracy (%)", "effective rank"]
    assert [axes.get_ylabel() for axes in figure.axes] == labels
    assert rank.get_xlabel() == "step"
    assert rate.get_ylim()[0] == accuracy.get_ylim()[0] == rank.get_ylim()[0] == 0
    assert accuracy.get_ylim()[1] > 80
    assert [line.get_label() for line in accuracy.lines] == ["kNN", "linear"]
    steps = np.arange(1, 41)
    np.testing.assert_allclose(loss.lines[0].get_xydata(), np.stack([steps, 9 - steps / 100], axis=1))
    np.testing.assert_allclose(rate.lines[0].get_xydata(), np.stack([steps, steps * 1e-3], axis=1))
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [[20, 10], [40, 20]])
    np.testing.assert_allclose(accuracy.lines[1].get_xydata(), [[20, 40], [40, 80]])
    np.testing.assert_allclose(rank.lines[0].get_xydata(), [[20, 4], [40, 8]])


def test_probe_curve(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"epoch": epoch, "loss": 9.0 / epoch, "accuracy": 8 * epoch, "val_accuracy": 7 * epoch} for epoch in (5, 9)]
    assert is_png(plots.probe_curve(rows, "study B", tmp_path / "new" / "curve.png"))
    [figure] = figures
    assert figure.get_suptitle() == "study B"
    loss, accuracy = figure.axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[5.0, 9 / 5], [9.0, 1.0]])
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [[5, 40], [9, 72]])
    np.testing.assert_allclose(accuracy.lines[1].get_xydata(), [[5, 35], [9, 63]])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["training", "validation"]


def test_curves_of_records_without_labels(tmp_path: Path, figures: list[Any]) -> None:
    plots.curves(training(3), tmp_path / "curves.svg")
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["loss", "learning rate"]
    assert figures[0].get_suptitle() == "3 steps, 0.3 epochs"
    assert all(tick == int(tick) for tick in figures[0].axes[-1].get_xticks())


@pytest.mark.parametrize("steps", [250, 251, 300])
def test_long_runs_get_a_centred_mean(steps: int, tmp_path: Path, figures: list[Any]) -> None:
    plots.curves(training(steps), tmp_path / "curves.png")
    each, mean = figures[0].axes[0].lines
    assert len(each.get_xdata()) == steps
    window = steps // 50
    assert mean.get_label() == f"mean of {window} steps"
    x, y = mean.get_xydata().T
    assert len(x) == steps - window + 1
    # The centred mean of a line is that line, but an even window is half a step off its centre.
    np.testing.assert_allclose(y, 9 - x / 100, atol=0.005 + 1e-9)


def test_thinned_metrics_are_named_so(tmp_path: Path, figures: list[Any]) -> None:
    plots.curves(training(1000)[7::8], tmp_path / "curves.png")
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["one step in 8", "mean of 2 of these"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run='.*' has no metrics.jsonl: expected the directory of a run"):
        plots.curves(tmp_path, tmp_path / "curves.png")


def test_run_without_a_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="photos: the run has no step yet"):
        plots.curves(write_run(tmp_path / "photos", []), tmp_path / "curves.png")


def test_damaged_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "photos", training(2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with pytest.raises(DataError, match=r"metrics.jsonl is damaged: line 3 is not JSON"):
        plots.curves(run, tmp_path / "curves.png")


@pytest.mark.parametrize(("channels", "drawn"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_reconstruction(channels: int, drawn: int, tmp_path: Path, figures: list[Any]) -> None:
    original = torch.rand(2, channels, 8, 8)
    masked, reconstructed = original * 0.5, original + 0.5
    out = plots.reconstruction(original, masked, reconstructed, tmp_path / "triptych.png")
    assert is_png(out)
    axes = figures[0].axes
    assert [a.get_title() for a in axes] == ["original", "masked", "reconstructed", "", "", ""]
    shown = [a.images[0].get_array() for a in axes]
    expected = [images[row] for row in range(2) for images in (original, masked, reconstructed.clamp(0, 1))]
    for picture, image in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(picture.reshape(8, 8, drawn), image[:drawn].permute(1, 2, 0))


def test_a_reconstruction_says_what_was_given(tmp_path: Path, figures: list[Any]) -> None:
    images = torch.rand(1, 3, 8, 8)
    plots.reconstruction(images, images, images, tmp_path / "triptych.png", norm_pix=True)
    assert figures[0].axes[2].get_title() == "reconstructed\ngiven each patch's\nmean and contrast"


def measured(protocol: str, correct: int) -> Report:
    """What a probe with `correct` of 200 images right reports."""
    targets = np.zeros(200, dtype=np.int64)
    predictions = (np.arange(200) >= correct).astype(np.int64)
    facts: dict[str, Any] = {"train_accuracy": None, "n_train": 1, "settings": {}, "seed": 0}
    return Report.score(protocol, predictions, targets, ("a", "b"), train_digest="", val_digest="", **facts)


def test_comparison(tmp_path: Path, figures: list[Any]) -> None:
    reports = [
        ("ours", measured("resubstitution", 180)),
        ("ours", measured("linear", 164)),
        ("ours", measured("knn", 158)),
        ("pixels", measured("linear", 120)),
    ]
    assert is_png(plots.comparison(reports, tmp_path / "comparison.png"))
    linear, knn, resubstitution = figures[0].axes
    assert [axes.get_title() for axes in figures[0].axes] == ["linear", "knn", "resubstitution"]
    assert [label.get_text() for label in linear.get_yticklabels()] == ["ours", "pixels"]
    assert linear.yaxis_inverted()  # the first label stands on top
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in linear.patches] == [
        (0, 82),
        (1, 60),
    ]
    assert [bar.get_width() for bar in knn.patches] == [79]
    assert [bar.get_width() for bar in resubstitution.patches] == [90]
    whiskers = [segment[:, 0] for segment in linear.collections[0].get_segments()]
    np.testing.assert_allclose(whiskers, [reports[1][1].interval, reports[3][1].interval])
    assert [text.get_text() for text in linear.texts] == ["82.0", "60.0"]


def test_missing_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'matplotlib is not installed: pip install "vision-ssl\[plot\]"'):
        plots.curves(training(2), tmp_path / "curves.png")


def test_no_global_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert plots.curves(training(2), tmp_path / "curves.png").exists()
