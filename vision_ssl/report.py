"""Reports: the outcome of a probe, with what it takes to trust it and to compare it with another."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from .errors import DataError

Labels: TypeAlias = npt.NDArray[np.int64]

RESUBSTITUTION = "resubstitution"  # the protocol whose accuracy is a training accuracy

_PERCENTILES = (2.5, 97.5)


class ClassScores(TypedDict):
    """Scores of one class.

    Attributes:
        support: Its test images.
        accuracy: How many of them were recognised (the recall), percent; None without any.
        f1: Harmonic mean of precision and recall, 0..1; 0 where neither is defined.
    """

    support: int
    accuracy: float | None
    f1: float


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Report:
    """The outcome of a probe.

    Attributes:
        protocol: How it was measured: "linear", "knn-20", "finetune", "resubstitution".
        accuracy: Test images that were classified correctly, percent.
        macro_f1: Mean over classes of their F1, 0..1; see `macro_f1`.
        interval: 95 % bootstrap interval of `accuracy` over the test images, percent.
        per_class: Scores of each class, in label order.
        train_accuracy: The same as `accuracy` on the training images; None for kNN.
        n_train: Number of training images.
        n_val: Number of test images.
        settings: Hyper-parameters of the protocol, and how they were chosen.
        seed: Of the split that chose them, and of the bootstrap.
        train_digest: `ImageSet.digest` of the training images.
        val_digest: Likewise of the test images.
        predictions: Class of each test image as predicted, int64 (n_val,); (draws, n_val) where a protocol draws its
            training images several times: accuracy, F1 and confusion then count all draws alike.
        targets: Class of each test image, int64 (n_val,).
        train_loss: Mean cross-entropy on the training images, nats; None where the protocol has none.
        scores: Further scores of the protocol by name, such as `top5_accuracy` (percent): the target is among the five
            most likely classes, of more than five.
    """

    protocol: str
    accuracy: float
    macro_f1: float
    interval: tuple[float, float]
    per_class: Mapping[str, ClassScores]
    train_accuracy: float | None
    n_train: int
    n_val: int
    settings: Mapping[str, Any]
    seed: int
    train_digest: str
    val_digest: str
    predictions: Labels = field(repr=False)
    targets: Labels = field(repr=False)
    train_loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def score(
        cls,
        protocol: str,
        predictions: Labels,
        targets: Labels,
        classes: Sequence[str],
        *,
        train_accuracy: float | None,
        n_train: int,
        settings: Mapping[str, Any],
        seed: int,
        train_digest: str,
        val_digest: str,
        train_loss: float | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> "Report":
        """Work out all scores from the predictions.

        Args:
            protocol: As the attribute, like all others that are not named here.
            predictions: int64 (n,) or (draws, n).
            targets: int64 (n,).
            classes: Class names in label order.
            train_accuracy: Percent, or None.
            n_train: Number of training images.
            settings: Plain data that JSON can hold.
            seed: Of the bootstrap.
            train_digest: Digest of the training images.
            val_digest: Digest of the test images.
            train_loss: Nats, or None.
            scores: Further scores, if there are any.

        Raises:
            DataError: The arrays differ in length, are empty, or hold a label that has no class.
        """
        confusion = confusion_matrix(targets, predictions, len(classes))
        f1, times_shown = _f1(confusion), confusion.sum(axis=1)
        correct = predictions == targets
        return cls(
            protocol=protocol,
            accuracy=100 * float(correct.mean()),
            macro_f1=float(np.nanmean(f1)),
            interval=_interval(100.0 * np.atleast_2d(correct).mean(axis=0), seed),
            per_class={
                name: {
                    "support": int(np.sum(targets == label)),
                    "accuracy": 100 * float(confusion[label, label] / shown) if shown else None,
                    "f1": float(np.nan_to_num(f1[label])),
                }
                for label, (name, shown) in enumerate(zip(classes, times_shown, strict=True))
            },
            train_accuracy=train_accuracy,
            n_train=n_train,
            n_val=len(targets),
            settings=settings,
            seed=seed,
            train_digest=train_digest,
            val_digest=val_digest,
            predictions=predictions,
            targets=targets,
            train_loss=train_loss,
            scores=scores or {},
        )

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the accuracies of the classes that have test images, percent: each class counts alike."""
        return float(np.mean([scores["accuracy"] for scores in self.per_class.values() if scores["support"]]))

    def confusion(self) -> npt.NDArray[np.int64]:
        """How often test images of each class (row) were taken for each class (column): int64 (K, K)."""
        return confusion_matrix(self.targets, self.predictions, len(self.per_class))

    def __str__(self) -> str:
        """Say it in a line."""
        low, high = self.interval
        trained = "" if self.train_accuracy is None else f" ({self.train_accuracy:.1f} % on them)"
        further = "".join(f", {name.replace('_', ' ')} {value:.3g}" for name, value in self.scores.items())
        return (
            f"{self.protocol}: {self.accuracy:.1f} % of {self.n_val:,} images (95 % interval {low:.1f} to "
            f"{high:.1f}), macro F1 {self.macro_f1:.3f}{further}, fitted on {self.n_train:,}{trained}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, one attribute a line.

        Raises:
            CheckpointError: The disk refuses.
        """
        from .storage import save_text  # imports torch, which nothing else here needs

        record = {item.name: getattr(self, item.name) for item in fields(self)}
        record |= {"predictions": self.predictions.tolist(), "targets": self.targets.tolist()}
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
        save_text(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """Read what `save` wrote.

        Raises:
            DataError: There is no such file, or it is no report.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            arrays = {name: np.array(record[name], dtype=np.int64) for name in ("predictions", "targets")}
            low, high = record["interval"]
            return cls(**{**record, **arrays, "interval": (low, high)})
        except FileNotFoundError as error:
            raise DataError(f"report {path}: looked for a file, found none") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"report {path}: not a report that this version wrote: {error!r}") from error


@dataclass(frozen=True)
class Difference:
    """How much more accurate one report is than another on the same images.

    Attributes:
        points: Difference of the accuracies, percentage points.
        interval: Its 95 % interval; a difference whose interval holds 0 may be chance.
    """

    points: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.points:+.1f} points (95 % interval {self.interval[0]:+.1f} to {self.interval[1]:+.1f})"


def macro_f1(targets: Labels, predictions: Labels, n_classes: int) -> float:
    """Mean of the F1 of each class, as scikit-learn's `f1_score(average="macro", zero_division=0)` has it.

    Classes that neither occur nor were predicted are left out of the mean; a class that was predicted but does
    not occur counts 0.

    Args:
        targets: int64 (n,), 0..n_classes - 1.
        predictions: int64 (n,), likewise.
        n_classes: Number of classes.

    Returns:
        0..1.

    Raises:
        DataError: The arrays differ in length, are empty, or hold a label outside the range.
    """
    return float(np.nanmean(_f1(confusion_matrix(targets, predictions, n_classes))))


def confusion_matrix(targets: Labels, predictions: Labels, n_classes: int) -> Labels:
    """Count how often each class (row) was taken for each class (column).

    Args:
        targets: int64 (n,), 0..n_classes - 1.
        predictions: int64 (n,) or (draws, n), likewise.
        n_classes: Number of classes K.

    Returns:
        int64 (K, K).

    Raises:
        DataError: The arrays differ in length, are empty, or hold a label outside the range.
    """
    given = predictions.shape[-1]
    if given != len(targets) or len(targets) == 0:
        raise DataError(
            f"predictions: got {given:,} for {len(targets):,} targets, expected one for each and at least one"
        )
    low, high = min(targets.min(), predictions.min()), max(targets.max(), predictions.max())
    if low < 0 or high >= n_classes:
        raise DataError(f"labels from {low} to {high}: expected 0 to {n_classes - 1}")
    pairs = n_classes * targets + predictions
    return np.bincount(pairs.ravel(), minlength=n_classes**2).reshape(n_classes, n_classes)


def paired_bootstrap(a: Report, b: Report, *, draws: int = 10_000, seed: int = 0) -> Difference:
    """Compare two reports on the same test images, in percentage points of accuracy: `a` minus `b`.

    The images are drawn again with replacement, each with what both predicted.

    Args:
        a: What is compared.
        b: With what.
        draws: Number of bootstrap samples.
        seed: Of the draws.

    Raises:
        DataError: The reports are not about the same test images in the same order.
    """
    if not np.array_equal(a.targets, b.targets) or list(a.per_class) != list(b.per_class):
        raise DataError(
            f"a and b differ in their test images ({a.n_val:,} and {b.n_val:,}) or classes: expected reports on "
            "the same images in the same order"
        )
    right, other = (np.atleast_2d(report.predictions == report.targets).mean(axis=0) for report in (a, b))
    gain = 100.0 * (right - other)
    return Difference(float(gain.mean()), _interval(gain, seed, draws))


def table(rows: Sequence[tuple[str, Report]]) -> str:
    """Lay out reports as a markdown table: a line for each label, two columns for each protocol.

    Args:
        rows: Labels and what was measured, in the order in which they are shown. What was measured by
            resubstitution stands last, whatever the order.

    Returns:
        Accuracy in percent with its 95 % interval, and macro F1; a dash where a label lacks a protocol.

    Raises:
        DataError: A label comes twice for the same protocol.
    """
    cells: dict[tuple[str, str], str] = {}
    for label, report in rows:
        if (label, report.protocol) in cells:
            raise DataError(f"rows: {label!r} comes twice for {report.protocol}, expected once")
        low, high = report.interval
        accuracy = f"{report.accuracy:.1f} ({low:.1f} to {high:.1f})"
        cells[label, report.protocol] = f"{accuracy} | {report.macro_f1:.3f}"
    labels = dict.fromkeys(label for label, _ in rows)
    protocols = sorted(dict.fromkeys(report.protocol for _, report in rows), key=lambda name: name == RESUBSTITUTION)
    lines = [
        ["features", *(f"{protocol}: accuracy (%) | macro F1" for protocol in protocols)],
        [":--", *("--: | --:" for _ in protocols)],
        *([label, *(cells.get((label, protocol), "- | -") for protocol in protocols)] for label in labels),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _f1(confusion: Labels) -> npt.NDArray[np.float64]:
    """F1 of each class, NaN for those that neither occur nor were predicted."""
    # F1 = 2 TP / (2 TP + FP + FN), and what is below is the number of targets plus that of predictions.
    mentions = confusion.sum(axis=0) + confusion.sum(axis=1)
    return np.where(mentions > 0, 2.0 * confusion.diagonal() / np.maximum(mentions, 1), np.nan)


def _interval(values: npt.NDArray[np.float64], seed: int, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (n,), one an image.

    Drawing n images again with replacement is drawing how often each distinct value comes, from a multinomial
    distribution.
    """
    levels, counts = np.unique(-values, return_counts=True)  # in falling order
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=draws)
    low, high = np.percentile(drawn @ -levels / len(values), _PERCENTILES)
    return float(low), float(high)
