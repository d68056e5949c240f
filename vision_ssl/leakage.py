"""Images that are in the training and in the validation split, which make a probe's score better than it is."""

import hashlib
import warnings
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import ImageSet
from .errors import DataError
from .features import Features
from .neighbours import similarities


def exact_twins(train: ImageSet, val: ImageSet) -> list[tuple[str, str]]:
    """Pairs of a training and a validation image whose decoded pixels are all equal, as their paths.

    Args:
        train: Training images.
        val: Validation images of the same size and channels.

    Raises:
        DataError: The images have different shapes.
    """
    if train.pixels.shape[1:] != val.pixels.shape[1:]:
        shapes = [tuple(images.pixels.shape[1:]) for images in (val, train)]
        raise DataError(f"val: images are {shapes[0]}, expected {shapes[1]} as in train")
    # Reading all pixels takes long where there are many: the middle row tells nearly all pairs apart.
    rows = [_contents(images.pixels[:, :, images.pixels.shape[2] // 2]) for images in (train, val)]
    candidates = set(rows[0]) & set(rows[1])
    known: dict[bytes, list[str]] = defaultdict(list)
    for index, row in enumerate(rows[0]):
        if row in candidates:
            known[_content(train.pixels[index])].append(train.paths[index])
    return [
        (twin, val.paths[index])
        for index, row in enumerate(rows[1])
        if row in candidates
        for twin in known.get(_content(val.pixels[index]), ())
    ]


def warn_of_twins(train: ImageSet, val: ImageSet) -> None:
    """Say how many validation images are in the training split too, unless the two splits are the same.

    Warns:
        UserWarning: There are such images.
    """
    if train.digest == val.digest:
        return  # no leak, but a mistake that is refused
    twins = {path for _, path in exact_twins(train, val)}
    if twins:
        warnings.warn(
            f"val: of {len(val):,} images, {len(twins):,} are in train too, pixel by pixel, and are scored as if they "
            "were new; `vision-ssl leaks --name NAME` lists them",
            stacklevel=3,
        )


def _contents(pixels: Tensor) -> list[bytes]:
    return [_content(image) for image in pixels]


def _content(pixels: Tensor) -> bytes:
    """What identifies pixels: 16 bytes, equal by chance once in 10^28 for 100,000 images."""
    return hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()


def near_twins(train: Features, val: Features, *, count: int = 20) -> list[tuple[str, str, float]]:
    """The most similar pairs of a training and a validation image, to be looked at: what is too near depends on both.

    Of each validation image, the nearest training image takes part.

    Args:
        train: Features of the training images.
        val: Features of the validation images, by the same encoder.
        count: How many pairs at most.

    Returns:
        Path of the training image, path of the validation image, and cosine similarity, the most similar first.
    """
    index, queries = F.normalize(train.features), F.normalize(val.features)
    nearest = [block.max(dim=1) for block in similarities(index, queries, leave_one_out=False)]
    cosine, twins = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    best = cosine.topk(min(count, len(val)))
    return [
        (train.paths[twins[row]], val.paths[row], similarity)
        for similarity, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
