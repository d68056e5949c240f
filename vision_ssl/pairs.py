"""What features must be before a probe is fitted and scored on them, and the report that comes out."""

import warnings
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor

from .cache import first_few
from .data import ImageSet
from .errors import DataError
from .features import Features
from .report import Report

TOP = 5


def check_pair(train: Features | ImageSet, val: Features | ImageSet) -> Tensor:
    """Return the training labels of two sets, of features or images, that fit together.

    Raises:
        DataError: They do not.

    Warns:
        UserWarning: `val` has a class that `train` lacks.
    """
    train_labels, val_labels = check_fit(train, "train"), check_labelled(val, "val")
    if train.classes != val.classes:
        pairs = enumerate(zip_longest(val.classes, train.classes))
        label, (ours, theirs) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        raise DataError(f"val: class {label} is {ours!r}, expected {theirs!r} as in train")
    if isinstance(train, Features) and isinstance(val, Features):
        for fact in ("encoder", "preprocess"):
            found, wanted = getattr(val, fact), getattr(train, fact)
            if found != wanted and found and wanted:
                raise DataError(f"val: {fact} of the features is {found!r}, expected {wanted!r} as in train")
        width, expected = val.features.shape[1], train.features.shape[1]
        if width != expected:
            raise DataError(f"val: features have width {width}, expected {expected} as in train")
    if train.digest == val.digest:
        raise DataError("val: holds the same images as train, expected others; to score on them, use resubstitution")
    lacking = ~torch.isin(val_labels, train_labels)
    if lacking.any():
        names = first_few([val.classes[label] for label in val_labels[lacking].unique().tolist()])
        warnings.warn(
            f"val: {int(lacking.sum()):,} images of {names} cannot be recognised, because train has none",
            stacklevel=3,
        )
    return train_labels


def check_labelled(images: Features | ImageSet, name: str) -> Tensor:
    """Return the labels of images, or of features that a probe can use."""
    what = "features" if isinstance(images, Features) else "images"
    if images.labels is None:
        raise DataError(f"{name}: got {len(images):,} {what} without labels, expected labelled ones")
    if isinstance(images, Features):
        bad = ~images.features.isfinite().all(dim=1)
        if bad.any():
            where = images.paths[int(bad.int().argmax())]
            raise DataError(
                f"{name}: {int(bad.sum()):,} of {len(images):,} features hold NaN or infinity, the first is of {where}"
            )
    return images.labels


def check_fit(images: Features | ImageSet, name: str) -> Tensor:
    """Return the labels of what a classifier can be fitted on."""
    labels = check_labelled(images, name)
    found = labels.unique()
    if len(found) < 2:
        raise DataError(f"{name}: {len(images):,} images of {len(found)} class, expected at least 2 classes")
    if isinstance(images, Features):
        low, high = images.features.aminmax(dim=0)
        if (high - low <= 1e-5 * torch.maximum(low.abs(), high.abs())).all():  # as much as rounding may leave
            warnings.warn(
                f"{name}: all {len(images):,} features are equal and tell nothing apart: has the encoder collapsed?",
                stacklevel=3,
            )
    return labels


def report(
    protocol: str,
    predictions: Tensor,
    train: Features | ImageSet,
    val: Features | ImageSet,
    settings: Mapping[str, Any],
    seed: int,
    *,
    top5: Tensor | None = None,
    n_train: int | None = None,
    scores: Mapping[str, float] | None = None,
    train_accuracy: float | None = None,
    train_loss: float | None = None,
) -> Report:
    """Score what was predicted for `val`.

    Args:
        protocol: Its name.
        predictions: int64 (n,) or (draws, n).
        train: What was fitted on.
        val: What was scored.
        settings: Plain data.
        seed: Of the protocol, and of the bootstrap.
        top5: Whether the target was among the five most likely classes, bool of the shape of `predictions`.
        n_train: How many images of `train` were fitted on; by default all.
        scores: Further scores.
        train_accuracy: Percent.
        train_loss: Nats.
    """
    further = dict(scores or {})
    if top5 is not None and len(val.classes) > TOP:
        further = {"top5_accuracy": 100 * float(top5.double().mean())} | further
    return Report.score(
        protocol,
        predictions.numpy(),
        cast(Tensor, val.labels).numpy(),
        val.classes,
        train_accuracy=train_accuracy,
        n_train=len(train) if n_train is None else n_train,
        settings=settings,
        seed=seed,
        train_digest=train.digest,
        val_digest=val.digest,
        train_loss=train_loss,
        scores=further,
    )


def in_top(scores: Tensor, labels: Tensor, count: int = TOP) -> Tensor:
    """Whether the label (n,) of each row is among its `count` largest scores (n, K); of equal ones the first count."""
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1) < count
