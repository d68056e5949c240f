"""What is measured of an encoder while it trains: on its features as they are, without touching its gradients."""

import os
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from .data import ImageSet
from .features import extract
from .neighbours import knn
from .probe import linear
from .spread import effective_rank

IMAGES = 10_000  # of the training images
RANKED = 100  # images at least: the rank of fewer says little of the encoder


def build_monitor(
    images: ImageSet, *, seed: int, cache_dir: str | os.PathLike[str] | None
) -> Callable[[nn.Module], dict[str, float]] | None:
    """A look at a model: the effective rank of its encoder's features, and accuracies where labels exist.

    There is none where neither can be measured.

    Of a sample of the training images, four fifths are what kNN and the linear probe know, and one fifth what they are
    asked. They are the protocols `knn-20` and `linear`, so that what is measured here and later on the exported encoder
    agrees.

    Args:
        images: The training images.
        seed: Of the sample, and of the linear probe.
        cache_dir: Where decoded images are kept.
    """
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    cut = len(sample) * 4 // 5
    known, asked = images.select(sample[:cut]), images.select(sample[cut:])
    in_class = torch.bincount(known.labels) if known.labels is not None else torch.zeros(1)
    ranked, comparable = cut >= RANKED, int((in_class > 0).sum()) > 1
    if not (ranked or comparable):
        return None

    def look(model: nn.Module) -> dict[str, float]:
        encoder, seen = cast(nn.Module, model.encoder), {}
        train = extract(encoder, known, cache_dir=cache_dir)
        if ranked:
            seen["effective_rank"] = effective_rank(train.features)
        if comparable:
            val = extract(encoder, asked, cache_dir=cache_dir)
            with warnings.catch_warnings():  # of few images of many classes, the index may lack one: no news each time
                warnings.simplefilter("ignore")
                seen["knn_accuracy"] = knn(train, val, k=min(20, cut), seed=seed).accuracy
                if in_class.max() > 1:  # the linear probe holds some out to choose by
                    where = next(encoder.parameters()).device
                    seen["linear_accuracy"] = linear(train, val, device=where, seed=seed).accuracy
        return seen

    return look
