"""How widely features and projections are spread: what tells early that a training collapses."""

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS = 256  # of views, for the quantities that compare all with all


def feature_std(features: Tensor) -> Tensor:
    """Standard deviation of unit features (B, D), as the mean over dimensions; near 1 / sqrt(D) when all are in use.

    Zero for equal features (Chen & He 2021, "Exploring Simple Siamese Representation Learning", section 4.1).
    """
    return F.normalize(features.float(), dim=1).std(dim=0).mean()


def effective_rank(features: Tensor) -> float:
    """How many dimensions features (n, D) spread over: between 1 and min(n, D).

    The exponential of the entropy of the singular values of the centred features (Roy & Vetterli 2007, "The effective
    rank: a measure of effective dimensionality", definition 1). Equal features have 1.
    """
    centred = (features - features.mean(dim=0)).double()
    shares = torch.linalg.svdvals(centred) if len(centred) < centred.shape[1] else _gram_singular_values(centred)
    shares = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def _gram_singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a tall matrix, by its Gram matrix: the quicker way, whose rounding is below one of them."""
    squares: Tensor = torch.linalg.eigvalsh(matrix.mT @ matrix)
    return squares.clamp_min(0).sqrt()


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of the two views of an image, as unit vectors: 0 if equal, 2 if unrelated.

    Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", equation 1 with alpha 2, of projections (B, P).
    """
    return (F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)).square().sum(dim=1).mean()


def uniformity(projections: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential of pairs: 0 if all are equal, towards -4 when spread evenly.

    Wang & Isola 2020, equation 2 with t 2, of the first `PAIRS` projections (B, P), as unit vectors.
    """
    some = F.normalize(projections[:PAIRS].float(), dim=1)
    with torch.autocast(some.device.type, enabled=False):  # which would multiply in bfloat16
        potential = (4 * (some @ some.mT) - 4).exp()  # -2 |a - b|^2 of unit vectors; torch.pdist lacks Apple's GPUs
    pairs = potential.sum() - potential.diagonal().sum()
    return (pairs / (len(some) * (len(some) - 1))).log()
