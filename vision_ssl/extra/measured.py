"""What the pages are about: an encoder, a sample of labelled images, and what probes say of them."""

import os
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import hub
from ..data import ImageSet, Source
from ..errors import RecipeError
from ..features import Features, extract, images_for, pixel_features
from ..probe import knn, linear
from ..report import Report

K = 20  # neighbours that vote
PIXELS = 16  # side of the raw pixels that an encoder must beat


@dataclass(frozen=True)
class Samples:
    """Labelled images to fit on, and others to score on, at the size that an encoder takes."""

    train: ImageSet
    val: ImageSet


def open_samples(
    encoder: hub.Encoder, data: Source, per_class: int, cache_dir: str | os.PathLike[str] | None = None
) -> Samples:
    """Take at most `per_class` images of each class from both splits of a source.

    Raises:
        DataError: The source cannot be read or has no labels.
        RecipeError: `per_class` is less than 2.
    """
    if per_class < 2:
        raise RecipeError(f"per_class={per_class}: expected at least 2, of which a probe holds one out")
    train, val = (
        _sample(images_for(encoder, data, split=split, cache_dir=cache_dir, require_labels=True)[0], per_class)
        for split in ("train", "val")
    )
    return Samples(train, val)


def _sample(images: ImageSet, per_class: int) -> ImageSet:
    """At most `per_class` images of each class, drawn by a fixed seed; the source itself if it has no more."""
    labels = cast(Tensor, images.labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = labels[order]
    kept = torch.cat([order[shuffled == label][:per_class] for label in range(len(images.classes))])
    return images if len(kept) == len(images) else images.select(kept.sort().values)


def features_of(
    encoder: hub.Encoder, samples: Samples, device: torch.device | None = None
) -> tuple[Features, Features]:
    """Features of the images to fit on, and of those to score on."""
    train, val = (extract(encoder, images, device=device) for images in (samples.train, samples.val))
    return train, val


def pixels_of(samples: Samples, cache_dir: str | os.PathLike[str] | None = None) -> tuple[Features, Features]:
    """Raw pixels instead of features."""
    train, val = (pixel_features(part, size=PIXELS, cache_dir=cache_dir) for part in (samples.train, samples.val))
    return train, val


def probes(train: Features, val: Features) -> tuple[Report, Report]:
    """A linear probe, and the vote of the nearest neighbours."""
    return linear(train, val), knn(train, val, k=min(K, len(train)))


def confusion(report: Report) -> npt.NDArray[np.int64]:
    """How many images of each class (row) were taken for each class (column)."""
    n = len(report.per_class)
    return np.bincount(report.targets * n + report.predictions, minlength=n * n).reshape(n, n)
