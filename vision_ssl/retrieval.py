"""Retrieval: whether the images that are most alike are of the same class."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Features
from .neighbours import similarities
from .pairs import check_fit, check_pair, report
from .report import Report

RANKS = (1, 5, 10)


def retrieval(gallery: Features, queries: Features | None = None, *, seed: int = 0) -> Report:
    """Rank the gallery for each query by cosine similarity; images of the query's class are what is looked for.

    The average precision of a query is the mean, over the images that are looked for, of the precision at their
    rank: of how many up to there are of the class. A query of which the gallery has none counts 0. Recall at k is
    the share of queries with one of them among the k nearest (as Oh Song et al. 2016 count it, "Deep Metric Learning
    via Lifted Structured Feature Embedding"); at 1 it is the accuracy of the nearest neighbour, which the report is
    about.

    The whole gallery is sorted for each query: the work grows with queries x gallery x log(gallery).

    Args:
        gallery: Features to search, with labels.
        queries: Features of other images, with labels of the same classes; without them, each image of the gallery
            searches all others, which the protocol calls `leave-one-out`.
        seed: Of the bootstrap.

    Returns:
        A report with the scores `mean_average_precision`, and `recall_at_1`, `_5` and `_10`, all 0..1.

    Raises:
        DataError: Labels are missing, or the two do not fit together.

    Warns:
        UserWarning: `queries` have a class that the gallery lacks, or all features are equal.
    """
    labels = check_fit(gallery, "gallery") if queries is None else check_pair(gallery, queries)
    asking = gallery if queries is None else queries
    targets = labels if queries is None else queries.labels
    assert targets is not None  # as checked
    others = len(gallery) - (queries is None)  # an image itself, at -inf, is the last that it finds
    index, vectors = F.normalize(gallery.features), F.normalize(asking.features)
    nearest: list[Tensor] = []
    precisions: list[Tensor] = []
    ranks: list[Tensor] = []
    done = 0
    for similarity in similarities(index, vectors, leave_one_out=queries is None):
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :others]
        found = labels[order] == targets[done : done + len(order), None]
        nearest.append(labels[order[:, 0]])
        precisions.append(average_precision(found))
        ranks.append(torch.where(found.any(dim=1), found.int().argmax(dim=1), others))  # of the first
        done += len(order)
    first = torch.cat(ranks)
    scores = {"mean_average_precision": float(torch.cat(precisions).mean())}
    scores |= {f"recall_at_{k}": float((first < k).double().mean()) for k in RANKS}
    protocol = "retrieval" if queries is not None else "retrieval-leave-one-out"
    settings = {"metric": "cosine"}
    return report(protocol, torch.cat(nearest), gallery, asking, settings, seed, n_train=others, scores=scores)


def average_precision(found: Tensor) -> Tensor:
    """Average precision float64 (B,) of rankings (B, n), which are true where what is looked for stands."""
    precision = found.cumsum(dim=1) / torch.arange(1, found.shape[1] + 1, dtype=torch.float64)
    return (precision * found).sum(dim=1) / found.sum(dim=1).clamp(min=1)
