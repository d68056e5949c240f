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
        predictions: Class of each test image as predicted, int64 (n_val,).
        targets: Class of each test image, int64 (n_val,).
        train_loss: Mean cross-entropy on the training images, nats; None where the protocol has none.
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
    ) -> "Report":
        """Work out all scores from the predictions.

        Args:
            protocol: As the attribute, like all others that are not named here.
            predictions: int64 (n,).
            targets: int64 (n,).
            classes: Class names in label order.
            train_accuracy: Percent, or None.
            n_train: Number of training images.
            settings: Plain data that JSON can hold.
            seed: Of the bootstrap.
            train_digest: Digest of the training images.
            val_digest: Digest of the test images.
            train_loss: Nats, or None.

        Raises:
            DataError: The arrays differ in length, are empty, or hold a label that has no class.
        """
        f1 = _f1(targets, predictions, len(classes))
        support = np.bincount(targets, minlength=len(classes))
        recognised = np.bincount(targets[predictions == targets], minlength=len(classes))
        return cls(
            protocol=protocol,
            accuracy=_accuracy(predictions, targets),
            macro_f1=macro_f1(targets, predictions, len(classes)),
            interval=_interval(predictions == targets, seed),
            per_class={
                name: {
                    "support": int(support[label]),
                    "accuracy": 100 * float(recognised[label] / support[label]) if support[label] else None,
                    "f1": float(np.nan_to_num(f1[label])),
                }
                for label, name in enumerate(classes)
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
        )

    def __str__(self) -> str:
        """Say it in a line."""
        low, high = self.interval
        trained = "" if self.train_accuracy is None else f" ({self.train_accuracy:.1f} % on them)"
        return (
            f"{self.protocol}: {self.accuracy:.1f} % of {self.n_val:,} images (95 % interval {low:.1f} to "
            f"{high:.1f}), macro F1 {self.macro_f1:.3f}, fitted on {self.n_train:,}{trained}"
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
    return float(np.nanmean(_f1(targets, predictions, n_classes)))


def paired_bootstrap(a: Report, b: Report, *, draws: int = 10_000, seed: int = 0) -> Difference:
    """Compare two reports on the same test images, in percentage points of accuracy: `a` minus `b`.

    The images are drawn again with replacement, each with what both predicted. An image adds 1, 0 or -1 to the
    difference, so that drawing n of them is drawing the counts of the three from a multinomial distribution.

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
    gain = (a.predictions == a.targets).astype(np.int64) - (b.predictions == b.targets)
    counts = np.bincount(gain + 1, minlength=3)
    drawn = np.random.default_rng(seed).multinomial(len(gain), counts / len(gain), size=draws)
    low, high = np.percentile(100 * (drawn[:, 2] - drawn[:, 0]) / len(gain), _PERCENTILES)
    return Difference(100 * float(gain.mean()), (float(low), float(high)))


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


def _f1(targets: Labels, predictions: Labels, n_classes: int) -> npt.NDArray[np.float64]:
    """F1 of each class, NaN for those that neither occur nor were predicted."""
    if len(targets) != len(predictions) or len(targets) == 0:
        raise DataError(
            f"predictions: got {len(predictions):,} for {len(targets):,} targets, expected one for each and at "
            "least one"
        )
    labels = np.concatenate([targets, predictions])
    if labels.min() < 0 or labels.max() >= n_classes:
        raise DataError(f"labels from {labels.min()} to {labels.max()}: expected 0 to {n_classes - 1}")
    hits = np.bincount(targets[predictions == targets], minlength=n_classes)
    mentions = np.bincount(labels, minlength=n_classes)
    # F1 = 2 TP / (2 TP + FP + FN), and what is below is the number of targets plus that of predictions.
    return np.where(mentions > 0, 2.0 * hits / np.maximum(mentions, 1), np.nan)


def _accuracy(predictions: Labels, targets: Labels) -> float:
    return 100 * float(np.mean(predictions == targets))


def _interval(correct: npt.NDArray[np.bool_], seed: int, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy, percent.

    Drawing n images again with replacement gives a binomial number of correct ones.
    """
    drawn = np.random.default_rng(seed).binomial(len(correct), correct.mean(), size=draws)
    low, high = np.percentile(100 * drawn / len(correct), _PERCENTILES)
    return float(low), float(high)
