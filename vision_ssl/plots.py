"""Pictures of runs and results. matplotlib is an extra, and is imported when a picture is drawn."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import DataError, MissingExtraError
from .report import RESUBSTITUTION, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

Record = Mapping[str, float]

# From the palette of Okabe and Ito (2008), which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"

SMOOTHED_FROM = 100  # steps; of a shorter run, each step is shown as a point


def curves(run: str | os.PathLike[str] | Sequence[Record], out: str | os.PathLike[str]) -> Path:
    """Draw loss, learning rate, and what the looks at the encoder gave, over the steps of a run.

    Args:
        run: Directory of a run, or the records of its `metrics.jsonl`.
        out: Where the picture goes; the suffix chooses the format, such as `.png` or `.svg`.

    Returns:
        The path of the picture.

    Raises:
        DataError: There is no run, or nothing in it yet.
        MissingExtraError: matplotlib is not installed.
    """
    if isinstance(run, str | os.PathLike):
        records, name = read_metrics(run), f"{Path(run).resolve().name}: "
    else:
        records, name = run, ""
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise DataError(f"{name}the run has no step yet: expected records with a loss")
    accuracies = [record for record in records if "knn_accuracy" in record]
    ranks = [record for record in records if "effective_rank" in record]
    panels = 2 + bool(accuracies) + bool(ranks)
    figure = _figure(7, 0.6 + 2.2 * panels)
    rows: Sequence[Axes] = figure.subplots(panels, sharex=True)
    _draw_loss(rows[0], _column(steps, "step"), _column(steps, "loss"))
    _draw_learning_rate(rows[1], _column(steps, "step"), _column(steps, "lr"))
    if accuracies:
        _draw_accuracies(rows[2], accuracies)
    if ranks:
        _draw_looks(rows[panels - 1], "effective rank", _column(ranks, "step"), _column(ranks, "effective_rank"))
    rows[-1].set_xlabel("step")
    rows[-1].set_xlim(left=0)
    rows[-1].xaxis.set_major_formatter("{x:,.0f}")
    rows[-1].locator_params(axis="x", integer=True)  # a run of three steps has no step 1.5
    figure.align_ylabels()
    figure.suptitle(f"{name}{int(steps[-1]['step']):,} steps, {steps[-1]['epoch']:.4g} epochs")
    return _save(figure, out)


def read_metrics(run: str | os.PathLike[str]) -> Sequence[Record]:
    """Read the records of a run, one for each step and one for each look at the encoder.

    Raises:
        DataError: There is no `metrics.jsonl`, or a line of it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"run={str(run)!r} has no metrics.jsonl: expected the directory of a run")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is damaged: line {number} is not JSON") from error
    return records


def probe_curve(rows: Sequence[Record], title: str, out: str | os.PathLike[str]) -> Path:
    """Draw how a probe improves over the epochs of a run.

    Args:
        rows: For each epoch measured, `epoch`, `loss` (nats), `accuracy` and `val_accuracy` (percent).
        title: Stands above.
        out: Where the picture goes; the suffix chooses the format.

    Returns:
        The path of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure(7, 5)
    above, below = figure.subplots(2, sharex=True)
    epochs = _column(rows, "epoch")
    _clean(above, "training loss")
    above.plot(epochs, _column(rows, "loss"), color=BLUE, marker="o", markersize=4, linewidth=1.8)
    _clean(below, "accuracy (%)")
    for name, label, colour in (("accuracy", "training", SKY), ("val_accuracy", "validation", GREEN)):
        below.plot(epochs, _column(rows, name), color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    below.set_ylim(bottom=0)
    below.set_xlabel("epoch")
    below.legend(frameon=False)
    figure.align_ylabels()
    figure.suptitle(title)
    return _save(figure, out)


def reconstruction(
    original: "Tensor",
    masked: "Tensor",
    reconstructed: "Tensor",
    out: str | os.PathLike[str],
    *,
    norm_pix: bool = False,
) -> Path:
    """Draw what MAE was shown and what it made of it: one row an image.

    Args:
        original: Float images (n, C, S, S) in 0..1, on the CPU; what lies outside is clipped.
        masked: The same with the removed patches blank.
        reconstructed: The same with the removed patches predicted.
        out: Where the picture goes; the suffix chooses the format.
        norm_pix: Whether each patch was predicted in terms of its own mean and contrast, as the picture then says.

    Returns:
        The path of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    given = "\ngiven each patch's\nmean and contrast" if norm_pix else ""
    columns = {"original": original, "masked": masked, f"reconstructed{given}": reconstructed}
    figure = _figure(2.2 * len(columns), (0.7 if given else 0.3) + 2.2 * len(original))
    grid = figure.subplots(len(original), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        grid[0, column].set_title(title)
        for axes, image in zip(grid[:, column], images, strict=True):
            # matplotlib draws RGB or one channel: of any other number, the first stand for all.
            channels = 3 if len(image) >= 3 else 1
            axes.imshow(image[:channels].permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    return _save(figure, out)


def comparison(reports: Sequence[tuple[str, Report]], out: str | os.PathLike[str]) -> Path:
    """Draw accuracies with their 95 % intervals: one panel a protocol, one bar a label.

    A training accuracy (`resubstitution`) stands last, whatever the order.

    Args:
        reports: Labels and what was measured, in the order in which they are shown; a label may come once for
            each protocol.
        out: Where the picture goes; the suffix chooses the format.

    Returns:
        The path of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    labels = list(dict.fromkeys(label for label, _ in reports))
    protocols = sorted({report.protocol: None for _, report in reports}, key=RESUBSTITUTION.__eq__)
    figure = _figure(2 + 3.2 * len(protocols), 0.8 + 0.4 * len(labels))
    panels = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    for axes, protocol in zip(panels, protocols, strict=True):
        chosen = [(label, report) for label, report in reports if report.protocol == protocol]
        rows = [labels.index(label) for label, _ in chosen]
        accuracy = np.array([report.accuracy for _, report in chosen])
        low, high = np.array([report.interval for _, report in chosen]).T
        axes.barh(rows, accuracy, xerr=(accuracy - low, high - accuracy), height=0.65, color=SKY, capsize=3)
        for row, value, end in zip(rows, accuracy, high, strict=True):
            axes.annotate(f"{value:.1f}", (end, row), (5, 0), textcoords="offset points", va="center")
        axes.margins(x=0.15)  # room for the numbers
        axes.set_xlabel("accuracy and 95 % interval (%)")
        axes.set_title(protocol)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    return _save(figure, out)


def _draw_loss(axes: "Axes", steps: npt.NDArray[np.float64], loss: npt.NDArray[np.float64]) -> None:
    _clean(axes, "loss")
    if len(steps) < SMOOTHED_FROM:
        axes.plot(steps, loss, color=BLUE, marker=".", linewidth=1.8)
        return
    window = len(steps) // 50
    smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    centre = steps[window // 2 :][: len(smooth)]
    apart = round(np.median(np.diff(steps)))  # of packaged weights, the metrics are thinned
    each, them = ("each step", "steps") if apart == 1 else (f"one step in {apart}", "of these")
    axes.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=0.8, label=each)
    axes.plot(centre, smooth, color=BLUE, linewidth=1.8, label=f"mean of {window:,} {them}")
    axes.legend(frameon=False)


def _draw_learning_rate(axes: "Axes", steps: npt.NDArray[np.float64], lr: npt.NDArray[np.float64]) -> None:
    _clean(axes, "learning rate")
    axes.plot(steps, lr, color=VERMILION, marker="." if len(steps) < SMOOTHED_FROM else "", linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)


def _draw_accuracies(axes: "Axes", records: Sequence[Record]) -> None:
    steps = _column(records, "step")
    _draw_looks(axes, "accuracy (%)", steps, _column(records, "knn_accuracy"))
    axes.lines[-1].set_label("kNN")
    if "linear_accuracy" in records[0]:
        linear = _column(records, "linear_accuracy")
        axes.plot(steps, linear, color=BLUE, marker="s", markersize=4, linewidth=1.8, label="linear")
        axes.set_ylim(0, 1.1 * max(*axes.get_ylim(), linear.max()))
    axes.legend(frameon=False)


def _draw_looks(axes: "Axes", label: str, steps: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> None:
    _clean(axes, label)
    axes.plot(steps, values, color=GREEN, marker="o", markersize=4, linewidth=1.8)
    axes.set_ylim(0, 1.1 * values.max() or 1)


def _column(records: Sequence[Record], name: str) -> npt.NDArray[np.float64]:
    return np.array([record[name] for record in records], dtype=np.float64)


def _clean(axes: "Axes", label: str) -> None:
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _figure(width: float, height: float) -> "Figure":
    """A figure of its own, in inches: pyplot would keep it alive, and may want a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: "Figure", out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise DataError(f"out={str(path)!r} has no suffix of a picture: expected one of .{', .'.join(sorted(formats))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    return path
