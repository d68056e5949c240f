"""Nearest neighbours: votes of the images that are most alike."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import RecipeError
from .features import Features
from .pairs import TOP, check_fit, check_pair, in_top, report
from .report import Report

Metric = Literal["cosine", "euclidean"]

KS = (1, 5, 10, 20, 200)  # the usual ones

BLOCK = 1 << 24  # elements of the largest temporary matrix, of similarities: 64 MB
QUERIES = 128  # rows of it at most: enough for the matrix product, and few enough for the cache
GROUP = 32  # neighbouring columns of it, whose largest are compared before all


def knn(
    train: Features,
    val: Features | None = None,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    metric: Metric = "cosine",
    seed: int = 0,
) -> Report:
    """Classify each image by a vote of its k nearest training images.

    A neighbour's vote weighs exp(cosine similarity / temperature) (Wu et al. 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", section 3.4). Of equally near neighbours the first in `train` counts,
    of classes with equal votes the first. Among the five most likely classes are only those with a vote.

    Published figures often count votes alike: k = 10 by cosine similarity (dkobak/simclr-cifar10), or k = 5 by
    Euclidean distance of features that are not normalised (W-MSE, CW-RGP).

    Args:
        train: Features to look for neighbours in, with labels.
        val: Features of other images, with labels of the same classes; without them, each image of `train` is
            classified by all others, which the protocol calls `leave-one-out`.
        k: Number of neighbours.
        temperature: Above 0; None counts every neighbour's vote alike.
        metric: "cosine", or "euclidean" with votes that count alike.
        seed: Of the bootstrap.

    Raises:
        DataError: Labels are missing, or the two do not fit together.
        RecipeError: `k` is more than there are training images, or a setting is out of range.

    Warns:
        UserWarning: `val` has a class that `train` lacks, or all features are equal.
    """
    labels = check_fit(train, "train") if val is None else check_pair(train, val)
    [found] = _votes(train, val, labels, (k,), temperature, metric, seed)
    return found


def knn_sweep(
    train: Features,
    val: Features | None = None,
    *,
    ks: Sequence[int] = KS,
    temperature: float | None = 0.07,
    metric: Metric = "cosine",
    seed: int = 0,
) -> list[Report]:
    """Classify as `knn` does, for several k by one search; return a report for each.

    To choose among them by their accuracy would make the validation images training images: report all, or one that
    was named beforehand.
    """
    labels = check_fit(train, "train") if val is None else check_pair(train, val)
    return _votes(train, val, labels, ks, temperature, metric, seed)


def similarities(index: Tensor, queries: Tensor, *, leave_one_out: bool) -> Iterator[Tensor]:
    """Products (B, n) of queries (m, D) with an index (n, D), block by block; each overwrites the one before.

    Where one is left out, query i is row i of the index, and its product with itself is replaced by -inf.
    """
    rows = min(max(1, BLOCK // len(index)), QUERIES)
    product = index.new_empty(rows, len(index))  # one for all blocks: fresh memory takes as long as the topk
    for number, block in enumerate(queries.split(rows)):
        part = torch.mm(block, index.T, out=product[: len(block)])
        if leave_one_out:
            part.diagonal(number * rows).fill_(-math.inf)
        yield part


def _votes(
    train: Features,
    val: Features | None,
    labels: Tensor,
    ks: Sequence[int],
    temperature: float | None,
    metric: Metric,
    seed: int,
) -> list[Report]:
    most = len(train) - (val is None)
    if not ks:
        raise RecipeError("k: got none, expected at least one number of neighbours")
    for k in ks:
        if not 1 <= k <= most:
            raise RecipeError(f"k={k}: expected 1 to {most:,}, the number of training images")
    if temperature is not None and not temperature > 0:
        raise RecipeError(f"temperature={temperature}: expected above 0, or None for votes of equal weight")
    if metric not in get_args(Metric):
        raise RecipeError(f"metric={metric!r}: expected 'cosine' or 'euclidean'")
    if metric == "euclidean" and temperature is not None:
        raise RecipeError(f"temperature={temperature}: expected None, since votes by Euclidean distance count alike")
    scored = train if val is None else val
    index, queries, targets = train.features, scored.features, labels if val is None else val.labels
    assert targets is not None  # as checked
    if metric == "cosine":
        index, queries = F.normalize(index), F.normalize(queries)
    else:  # (q, 1) . (x, -|x|^2 / 2) = (|q|^2 - |q - x|^2) / 2
        index = torch.cat([index, index.square().sum(dim=1, keepdim=True) / -2], dim=1)
        queries = F.pad(queries, (0, 1), value=1.0)
    predictions = torch.empty(len(ks), len(scored), dtype=torch.int64)
    top5 = torch.empty(len(ks), len(scored), dtype=torch.bool)
    done = 0
    for block in similarities(index, queries, leave_one_out=val is None):
        rows = slice(done, done + len(block))
        for place, votes in enumerate(_vote(block, labels, len(train.classes), ks, temperature)):
            predictions[place, rows] = votes.argmax(dim=1)
            voted = votes.gather(1, targets[rows, None])[:, 0] > 0
            top5[place, rows] = in_top(votes, targets[rows]) & voted
        done += len(block)
    name = ("-unweighted" if temperature is None else "") + ("" if metric == "cosine" else f"-{metric}")
    return [
        report(
            f"knn-{k}{name}" + ("-leave-one-out" if val is None else ""),
            predictions[place],
            train,
            scored,
            {"k": k, "temperature": temperature, "metric": metric},
            seed,
            top5=top5[place] if k >= TOP else None,
            n_train=most,
        )
        for place, k in enumerate(ks)
    ]


def _vote(
    similarity: Tensor, labels: Tensor, n_classes: int, ks: Sequence[int], temperature: float | None
) -> Iterator[Tensor]:
    """Votes (B, n_classes) of the k nearest of n training images for each k, from similarities (B, n)."""
    nearest = _nearest(similarity, max(ks))
    weight = torch.ones_like(nearest, dtype=similarity.dtype)
    if temperature is not None:
        near = similarity.gather(1, nearest)
        weight = ((near - near[:, :1]) / temperature).exp()  # cannot overflow like this
    for k in ks:
        votes = similarity.new_zeros(len(similarity), n_classes)
        yield votes.scatter_add_(1, labels[nearest[:, :k]], weight[:, :k])


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k largest in each row, in falling order; of equal ones the first, unlike `topk`."""
    largest, nearest = _topk(similarity, min(k + 1, similarity.shape[1]))
    last = largest[:, k - 1 : k]
    tied = (largest[:, k:] == last).any(dim=1)
    nearest = nearest[:, :k]
    if tied.any():
        rows, last = similarity[tied], last[tied]
        above, level = rows > last, rows == last
        room = k - above.sum(dim=1, keepdim=True)
        nearest[tied] = (above | level & (level.cumsum(dim=1) <= room)).nonzero()[:, 1].view(-1, k)
    nearest = nearest.sort(dim=1).values
    return nearest.gather(1, similarity.gather(1, nearest).argsort(dim=1, descending=True, stable=True))


def _topk(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest (B, k) in each row, in falling order, and their indices; in long rows faster than `topk`.

    The k largest lie in the k groups of columns with the largest maxima, or equals of them do.
    """
    n = similarity.shape[1]
    grouped = n // GROUP * GROUP
    if grouped // GROUP <= k:
        return similarity.topk(k, dim=1)
    groups = similarity[:, :grouped].unflatten(1, (-1, GROUP))
    best = groups.amax(dim=2).topk(k, dim=1).indices
    columns = (best[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    columns = torch.cat([columns, torch.arange(grouped, n).expand(len(columns), -1)], dim=1)
    largest, nearest = similarity.gather(1, columns).topk(k, dim=1)
    return largest, columns.gather(1, nearest)
