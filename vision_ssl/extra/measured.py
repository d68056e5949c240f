"""What the pages are about: an encoder, a sample of labelled images, and what probes say of them."""

import os
from dataclasses import dataclass

import torch

from .. import hub
from ..data import ImageSet, Source
from ..errors import RecipeError
from ..features import Features, extract, images_for, pixel_features
from ..neighbours import knn
from ..probe import linear
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
        images_for(encoder, data, split=split, cache_dir=cache_dir, require_labels=True)[0].per_class(per_class)
        for split in ("train", "val")
    )
    return Samples(train, val)


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
