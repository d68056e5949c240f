import json
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from vision_ssl.errors import DataError
from vision_ssl.report import Report, macro_f1, paired_bootstrap, table

CLASSES = ("cat", "dog", "owl", "yak")

Labels = npt.NDArray[np.int64]
LABEL = st.integers(0, len(CLASSES) - 1)
PAIRS = st.lists(st.tuples(LABEL, LABEL), min_size=1, max_size=30)


def report(predictions: Labels, targets: Labels, protocol: str = "linear", **changes: Any) -> Report:
    facts: dict[str, Any] = {
        "train_accuracy": 90.0,
        "n_train": 500,
        "settings": {"l2": 0.01},
        "seed": 0,
        "train_digest": "a" * 64,
        "val_digest": "b" * 64,
    }
    return Report.score(protocol, predictions, targets, CLASSES, **(facts | changes))


def random_report(accuracy: float, n: int = 400, seed: int = 0, protocol: str = "linear") -> Report:
    """Four equal classes; about `accuracy` (0..1) of the predictions are right, the others are off by one."""
    right = np.random.default_rng(seed).random(n) < accuracy
    targets = np.arange(n) % len(CLASSES)
    return report(np.where(right, targets, (targets + 1) % len(CLASSES)), targets, protocol)


@settings(deadline=None, max_examples=50)
@given(PAIRS)
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    targets, predictions = np.array(pairs).T
    measured = report(predictions, targets)
    assert measured.macro_f1 == pytest.approx(f1_score(targets, predictions, average="macro", zero_division=0))
    _, recall, f1, support = precision_recall_fscore_support(
        targets, predictions, labels=range(len(CLASSES)), zero_division=0
    )
    assert list(measured.per_class) == list(CLASSES)
    for label, scores in enumerate(measured.per_class.values()):
        assert scores["support"] == support[label]
        assert scores["accuracy"] == (pytest.approx(100 * recall[label]) if support[label] else None)
        assert scores["f1"] == pytest.approx(f1[label])
    assert measured.accuracy == pytest.approx(100 * np.mean(targets == predictions))
    assert measured.n_val == len(pairs)
    assert np.array_equal(measured.confusion(), confusion_matrix(targets, predictions, labels=range(len(CLASSES))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that were predicted and do not occur
        expected = balanced_accuracy_score(targets, predictions)
    assert measured.balanced_accuracy == pytest.approx(100 * expected)


def test_macro_f1_leaves_out_a_class_without_images_unless_it_is_predicted() -> None:
    targets = np.array([0, 0, 1, 1])
    assert macro_f1(targets, targets, 4) == 1
    assert macro_f1(targets, np.array([0, 0, 1, 3]), 4) == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(
    ("targets", "predictions", "message"),
    [
        ([0, 1], [0], "predictions: got 1 for 2 targets"),
        ([], [], "predictions: got 0 for 0 targets"),
        ([0, 4], [0, 1], "labels from 0 to 4: expected 0 to 3"),
        ([0, 1], [0, -1], "labels from -1 to 1: expected 0 to 3"),
    ],
)
def test_labels_that_do_not_fit(targets: list[int], predictions: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        macro_f1(np.array(targets, dtype=np.int64), np.array(predictions, dtype=np.int64), 4)


def test_interval_is_nearly_the_normal_one() -> None:
    measured = random_report(0.7)
    half = 1.96 * np.sqrt(measured.accuracy * (100 - measured.accuracy) / measured.n_val)
    assert measured.interval == pytest.approx((measured.accuracy - half, measured.accuracy + half), abs=0.4)
    assert random_report(0.7).interval == measured.interval


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    hits = [low <= 60 <= high for low, high in (random_report(0.6, seed=seed).interval for seed in range(200))]
    assert 0.9 <= np.mean(hits) <= 0.99


def test_seed_draws_the_interval_anew() -> None:
    targets, predictions = random_report(0.7).targets, random_report(0.7).predictions
    intervals = {report(predictions, targets, seed=seed).interval for seed in range(10)}
    assert len(intervals) > 1


def test_several_draws_count_alike() -> None:
    single = [random_report(accuracy, seed=seed) for seed, accuracy in enumerate((0.9, 0.5, 0.6))]
    measured = report(np.stack([one.predictions for one in single]), single[0].targets)
    assert measured.accuracy == pytest.approx(np.mean([one.accuracy for one in single]))
    assert measured.balanced_accuracy == pytest.approx(np.mean([one.balanced_accuracy for one in single]))
    assert np.array_equal(measured.confusion(), sum(one.confusion() for one in single))
    assert (measured.n_val, measured.per_class["cat"]["support"]) == (400, 100)
    pooled = np.concatenate([one.predictions for one in single])
    assert measured.macro_f1 == macro_f1(np.tile(single[0].targets, 3), pooled, len(CLASSES))


def test_interval_of_several_draws_is_over_images_and_not_over_predictions() -> None:
    one = random_report(0.7)
    assert report(np.stack([one.predictions] * 9), one.targets).interval == pytest.approx(one.interval)
    other = random_report(0.4, seed=1)
    assert paired_bootstrap(report(np.stack([one.predictions] * 9), one.targets), other).interval == pytest.approx(
        paired_bootstrap(one, other).interval
    )


def test_paired_bootstrap_is_resampling_of_images() -> None:
    a, b = random_report(0.8, seed=1), random_report(0.7, seed=2)
    difference = paired_bootstrap(a, b)
    gain = 100.0 * ((a.predictions == a.targets).astype(int) - (b.predictions == b.targets))
    images = np.random.default_rng(3).integers(0, len(gain), size=(5_000, len(gain)))
    assert difference.points == pytest.approx(a.accuracy - b.accuracy)
    assert difference.interval == pytest.approx(np.percentile(gain[images].mean(axis=1), [2.5, 97.5]), abs=0.6)


def test_paired_bootstrap_knows_that_errors_go_together() -> None:
    worse = random_report(0.6)
    better = worse.predictions.copy()
    better[np.flatnonzero(better != worse.targets)[:20]] = worse.targets[better != worse.targets][:20]
    difference = paired_bootstrap(report(better, worse.targets), worse)
    assert difference.points == 5
    assert difference.interval[0] > 2.5  # the two accuracies alone have intervals of +- 5
    assert str(difference) == "+5.0 points (95 % interval +3.0 to +7.2)"


def test_paired_bootstrap_of_a_report_with_itself() -> None:
    same = random_report(0.6)
    difference = paired_bootstrap(same, same)
    assert (difference.points, difference.interval) == (0, (0, 0))


def test_paired_bootstrap_depends_on_the_seed_and_on_nothing_else() -> None:
    a, b = random_report(0.8, seed=1), random_report(0.7, seed=2)
    assert paired_bootstrap(a, b, draws=50, seed=1) == paired_bootstrap(a, b, draws=50, seed=1)
    assert paired_bootstrap(a, b, draws=50, seed=1) != paired_bootstrap(a, b, draws=50, seed=2)


def test_paired_bootstrap_refuses_other_images() -> None:
    a = random_report(0.8)
    other = report(a.predictions, np.roll(a.targets, 1))
    renamed = replace(a, per_class={f"{name}s": scores for name, scores in a.per_class.items()})
    for b in (other, renamed, random_report(0.8, n=200)):
        with pytest.raises(DataError, match="a and b differ in their test images"):
            paired_bootstrap(a, b)


@pytest.mark.parametrize(("train_accuracy", "train_loss"), [(None, None), (93.5, 0.25)])
def test_save_and_load(tmp_path: Path, train_accuracy: float | None, train_loss: float | None) -> None:
    targets = np.array([0, 1, 1, 2])
    facts: dict[str, Any] = {"train_accuracy": train_accuracy, "settings": {"k": 20, "temperature": None}}
    facts |= {"train_loss": train_loss, "scores": {"top5_accuracy": 75.0}}
    saved = report(np.array([0, 1, 2, 2]), targets, **facts)
    saved.save(tmp_path / "new" / "report.json")
    loaded = Report.load(tmp_path / "new" / "report.json")
    for item in fields(Report):
        before, after = getattr(saved, item.name), getattr(loaded, item.name)
        if isinstance(before, np.ndarray):
            assert np.array_equal(before, after)
            assert after.dtype == np.int64
        else:
            assert before == after
    assert loaded.per_class["yak"] == {"support": 0, "accuracy": None, "f1": 0}


def test_load_of_several_draws(tmp_path: Path) -> None:
    saved = report(np.array([[0, 1, 2], [2, 1, 0]]), np.array([0, 1, 1]))
    saved.save(tmp_path / "report.json")
    assert np.array_equal(Report.load(tmp_path / "report.json").predictions, saved.predictions)


def test_load_of_a_report_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    random_report(0.7).save(path)
    record = json.loads(path.read_text())
    for later in ("train_loss", "scores"):
        del record[later]
    path.write_text(json.dumps(record))
    assert (Report.load(path).train_loss, Report.load(path).scores) == (None, {})


def test_a_saved_report_has_a_line_for_each_attribute(tmp_path: Path) -> None:
    random_report(0.7).save(tmp_path / "report.json")
    lines = (tmp_path / "report.json").read_text().splitlines()
    assert [line.split('"')[1] for line in lines[1:-1]] == [item.name for item in fields(Report)]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("predictions"),
        lambda record: record.pop("accuracy"),
        lambda record: record.update(curve=[]),
        lambda record: record.update(interval=[1.0]),
        lambda record: record.update(targets=["cat"]),
    ],
)
def test_load_of_something_else(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "report.json"
    random_report(0.7).save(path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"report .*report\.json: not a report"):
        Report.load(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"protocol": "linear"', "\udcff"])
def test_load_of_what_is_no_report(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="not a report"):
        Report.load(path)


def test_load_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: looked for a file, found none"):
        Report.load(tmp_path / "none.json")


def test_str() -> None:
    targets = np.arange(1200) % 4
    predictions = np.where(np.arange(1200) < 900, targets, 0)
    assert str(report(predictions, targets)) == (
        "linear: 81.2 % of 1,200 images (95 % interval 79.0 to 83.4), macro F1 0.825, fitted on 500 (90.0 % on them)"
    )
    assert str(report(predictions, targets, "knn-20", train_accuracy=None)).endswith("fitted on 500")
    further = report(predictions, targets, scores={"top5_accuracy": 95.04, "recall_at_5": 0.5})
    assert ", macro F1 0.825, top5 accuracy 95, recall at 5 0.5, fitted on 500 (" in str(further)


def test_table_puts_resubstitution_last_and_marks_what_is_missing() -> None:
    targets = np.arange(100) % 4
    half = np.where(np.arange(100) < 50, targets, 0)
    rows = [
        ("simclr", report(targets, targets, "resubstitution")),
        ("simclr", report(targets, targets)),
        ("simclr", report(half, targets, "knn-20")),
        ("pixels", report(half, targets)),
    ]
    low, high = rows[2][1].interval
    cell = f"{rows[2][1].accuracy:.1f} ({low:.1f} to {high:.1f}) | {rows[2][1].macro_f1:.3f}"
    perfect = "100.0 (100.0 to 100.0) | 1.000"
    assert table(rows).splitlines() == [
        "| features | linear: accuracy (%) | macro F1 | knn-20: accuracy (%) | macro F1 "
        "| resubstitution: accuracy (%) | macro F1 |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
        f"| simclr | {perfect} | {cell} | {perfect} |",
        f"| pixels | {cell} | - | - | - | - |",
    ]


def test_table_refuses_the_same_measurement_twice() -> None:
    rows = [("simclr", random_report(0.7)), ("simclr", random_report(0.8))]
    with pytest.raises(DataError, match="'simclr' comes twice for linear"):
        table(rows)


def test_reports_are_read_without_torch() -> None:
    code = "import sys, vision_ssl.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
