"""Probes: how well a simple classifier on frozen features tells classes apart.

The linear probes and kNN are fitted on training images and scored on others. `resubstitution` scores on the images
that it was fitted on: it shows how well a classifier memorises, not how good the features are.
"""

import os
import warnings
from itertools import zip_longest
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import first_few
from .data import ImageSet, Source, Split
from .errors import DataError, RecipeError
from .features import Features, extract
from .linear_sgd import STUDY_B, SWEEP, SGDProbe, sgd_classifier
from .logistic import Classifier, choose_l2, logistic_regression
from .report import RESUBSTITUTION, Report

Protocol = Literal["linear", "linear-sgd", "linear-sgd-study-b", "knn", "resubstitution"]
Metric = Literal["cosine", "euclidean"]

SGD_PROBES = {probe.protocol: probe for probe in (SWEEP, STUDY_B)}

MEMORISING_L2 = 1e-4  # of resubstitution

BLOCK = 1 << 24  # elements of the largest temporary matrix, of similarities: 64 MB
QUERIES = 128  # rows of it at most: enough for the matrix product, and few enough for the cache
GROUP = 32  # neighbouring columns of it, whose largest are compared before all


def linear(train: Features, val: Features, *, seed: int = 0) -> Report:
    """Fit a linear classifier on training features, and score it on others.

    Features are standardised by the statistics of the training images. The classifier is multinomial logistic
    regression, solved to convergence; `logistic_regression` states its objective. Its l2 comes from a logarithmic
    grid by the cross-entropy on a held-out fifth of the training images, at most 20,000 of which take part in that
    choice; the classifier is then fitted on all. Validation images serve for nothing but the scores.

    Args:
        train: Features to fit on, with labels.
        val: Features of other images, with labels of the same classes.
        seed: Of the held-out split and the bootstrap.

    Raises:
        DataError: Labels are missing, or the two do not fit together.

    Warns:
        UserWarning: `val` has a class that `train` lacks, or the solver ran out of iterations.
    """
    train_labels = check_pair(train, val)
    n_classes = len(train.classes)
    settings = choose_l2(train.features, train_labels, n_classes, seed)
    classifier = logistic_regression(train.features, train_labels, n_classes, settings["l2"])
    return _linear_report("linear", classifier, train, val, settings, seed)


def linear_sgd(
    train: Features,
    val: Features,
    *,
    probe: SGDProbe = SWEEP,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Report:
    """Train a linear classifier on training features by stochastic gradient descent, and score it on others.

    By default its learning rate comes from a logarithmic grid, by the accuracy on a held-out fifth of the training
    images; `STUDY_B` has one learning rate and chooses nothing. Validation images serve for nothing but the scores.

    Args:
        train: Features to train on, with labels.
        val: Features of other images, with labels of the same classes.
        probe: How the classifier is trained.
        device: Where; by default on the CPU.
        seed: Of the weights, the batches, the held-out split and the bootstrap.

    Raises:
        DataError: Labels are missing, or the two do not fit together.

    Warns:
        UserWarning: `val` has a class that `train` lacks.
    """
    labels = check_pair(train, val)
    classifier, settings = sgd_classifier(
        train.features, labels, len(train.classes), probe, seed=seed, device=device or "cpu"
    )
    return _linear_report(probe.protocol, classifier, train, val, settings, seed)


def knn(
    train: Features,
    val: Features,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    metric: Metric = "cosine",
    seed: int = 0,
) -> Report:
    """Classify each image by a vote of its k nearest training images.

    A neighbour's vote weighs exp(cosine similarity / temperature) (Wu et al. 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", section 3.4). Of equally near neighbours the first in `train` counts,
    of classes with equal votes the first.

    Published figures often count votes alike: k = 10 by cosine similarity (dkobak/simclr-cifar10), or k = 5 by
    Euclidean distance of features that are not normalised (W-MSE, CW-RGP).

    Args:
        train: Features to look for neighbours in, with labels.
        val: Features of other images, with labels of the same classes.
        k: Number of neighbours.
        temperature: Above 0; None counts every neighbour's vote alike.
        metric: "cosine", or "euclidean" with votes that count alike.
        seed: Of the bootstrap.

    Raises:
        DataError: Labels are missing, or the two do not fit together.
        RecipeError: `k` is more than there are training images, or a setting is out of range.

    Warns:
        UserWarning: `val` has a class that `train` lacks.
    """
    if not 1 <= k <= len(train):
        raise RecipeError(f"k={k}: expected 1 to {len(train):,}, the number of training images")
    if temperature is not None and not temperature > 0:
        raise RecipeError(f"temperature={temperature}: expected above 0, or None for votes of equal weight")
    if metric not in get_args(Metric):
        raise RecipeError(f"metric={metric!r}: expected 'cosine' or 'euclidean'")
    if metric == "euclidean" and temperature is not None:
        raise RecipeError(f"temperature={temperature}: expected None, since votes by Euclidean distance count alike")
    labels = check_pair(train, val)
    index, queries = train.features, val.features
    if metric == "cosine":
        index, queries = F.normalize(index), F.normalize(queries)
    else:  # (q, 1) . (x, -|x|^2 / 2) = (|q|^2 - |q - x|^2) / 2
        index = torch.cat([index, index.square().sum(dim=1, keepdim=True) / -2], dim=1)
        queries = F.pad(queries, (0, 1), value=1.0)
    rows = min(max(1, BLOCK // len(train)), QUERIES)
    similarity = index.new_empty(rows, len(train))  # one for all blocks: fresh memory takes as long as the topk
    predictions = [
        _vote(
            torch.mm(block, index.T, out=similarity[: len(block)]),
            labels,
            len(train.classes),
            k,
            temperature,
        )
        for block in queries.split(rows)
    ]
    protocol = (
        f"knn-{k}" + ("-unweighted" if temperature is None else "") + ("" if metric == "cosine" else f"-{metric}")
    )
    settings = {"k": k, "temperature": temperature, "metric": metric}
    return _report(protocol, torch.cat(predictions), train, val, settings, seed)


def resubstitution(features: Features, *, seed: int = 0) -> Report:
    """Fit a linear classifier and score it on the very same images: a training accuracy.

    It exists to compare with work that reports such figures. The classifier is that of `linear`, with a penalty
    so weak that it memorises what it can.

    Args:
        features: Features to fit and score on, with labels.
        seed: Of the bootstrap.

    Raises:
        DataError: Labels are missing or of a single class, or a feature is not finite.

    Warns:
        UserWarning: Always: what this measures is not the quality of the features.
    """
    warnings.warn(
        "resubstitution scores a classifier on the images that it was fitted on: this is a training accuracy, and "
        "says little about the features",
        stacklevel=2,
    )
    labels = _check_fit(features, "features")
    settings = {"l2": MEMORISING_L2}
    classifier = logistic_regression(features.features, labels, len(features.classes), settings["l2"])
    return _linear_report(RESUBSTITUTION, classifier, features, features, settings, seed)


def evaluate(
    encoder: nn.Module,
    *,
    train: "Source | Features",
    val: "Source | Features",
    protocol: Protocol = "linear",
    k: int = 20,
    temperature: float | None = 0.07,
    metric: Metric = "cosine",
    classes: int | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Report:
    """Measure an encoder: extract the features of both sources, and probe them.

    Args:
        encoder: A frozen encoder, as `extract` takes it.
        train: Labelled images to fit on (of a source with several splits, "train"), or their features.
        val: Labelled images to score on (of a source with several splits, "val"), or their features.
        protocol: "linear"; "linear-sgd" or "linear-sgd-study-b", which train it by SGD; "knn"; or "resubstitution",
            which fits and scores on `val` and never opens `train`.
        k: Neighbours that vote in "knn".
        temperature: Of their votes; see `knn`.
        metric: By which they are near; see `knn`.
        classes: Only the first so many classes by name take part; by default all.
        device: Where the encoder and SGD compute; by default where the encoder is, and on the CPU.
        cache_dir: Where the decoded images are kept.
        seed: See the protocol.

    Raises:
        DataError: A source cannot be read or has no labels, or the two do not fit together.
        RecipeError: There is no such protocol.
    """

    def features(source: "Source | Features", split: Split) -> Features:
        found = source
        if not isinstance(found, Features):
            found = extract(encoder, found, split=split, device=device, cache_dir=cache_dir, require_labels=True)
        return found if classes is None else found.first_classes(classes)

    if protocol == "linear":
        return linear(features(train, "train"), features(val, "val"), seed=seed)
    if protocol in SGD_PROBES:
        probe = SGD_PROBES[protocol]
        return linear_sgd(features(train, "train"), features(val, "val"), probe=probe, device=device, seed=seed)
    if protocol == "knn":
        settings: dict[str, Any] = {"k": k, "temperature": temperature, "metric": metric}
        return knn(features(train, "train"), features(val, "val"), **settings, seed=seed)
    if protocol == "resubstitution":
        return resubstitution(features(val, "val"), seed=seed)
    raise RecipeError(f"protocol={protocol!r}: expected one of {', '.join(get_args(Protocol))}")


def check_pair(train: Features | ImageSet, val: Features | ImageSet) -> Tensor:
    """Return the training labels of two sets, of features or images, that fit together.

    Raises:
        DataError: They do not.

    Warns:
        UserWarning: `val` has a class that `train` lacks.
    """
    train_labels, val_labels = _check_fit(train, "train"), _check(val, "val")
    if train.classes != val.classes:
        pairs = enumerate(zip_longest(val.classes, train.classes))
        label, (ours, theirs) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        raise DataError(f"val: class {label} is {ours!r}, expected {theirs!r} as in train")
    if isinstance(train, Features) and isinstance(val, Features):
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


def _check(images: Features | ImageSet, name: str) -> Tensor:
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


def _check_fit(images: Features | ImageSet, name: str) -> Tensor:
    """Return the labels of what a classifier can be fitted on."""
    labels = _check(images, name)
    found = labels.unique()
    if len(found) < 2:
        raise DataError(f"{name}: {len(images):,} images of {len(found)} class, expected at least 2 classes")
    return labels


def _report(
    protocol: str,
    predictions: Tensor,
    train: Features,
    val: Features,
    settings: dict[str, Any],
    seed: int,
    *,
    train_accuracy: float | None = None,
    train_loss: float | None = None,
) -> Report:
    return Report.score(
        protocol,
        predictions.numpy(),
        cast(Tensor, val.labels).numpy(),
        val.classes,
        train_accuracy=train_accuracy,
        n_train=len(train),
        settings=settings,
        seed=seed,
        train_digest=train.digest,
        val_digest=val.digest,
        train_loss=train_loss,
    )


def _linear_report(
    protocol: str, classifier: Classifier, train: Features, val: Features, settings: dict[str, Any], seed: int
) -> Report:
    labels = cast(Tensor, train.labels)
    accuracy = 100 * float((classifier.predict(train.features) == labels).double().mean())
    loss = classifier.cross_entropy(train.features, labels)
    predictions = classifier.predict(val.features)
    return _report(protocol, predictions, train, val, settings, seed, train_accuracy=accuracy, train_loss=loss)


def _vote(similarity: Tensor, labels: Tensor, n_classes: int, k: int, temperature: float | None) -> Tensor:
    """Classes (B,) that the k nearest of n training images vote for, from similarities (B, n)."""
    nearest = _nearest(similarity, k)
    weight = torch.ones_like(nearest, dtype=similarity.dtype)
    if temperature is not None:
        near = similarity.gather(1, nearest)
        weight = ((near - near.amax(dim=1, keepdim=True)) / temperature).exp()  # cannot overflow like this
    votes = similarity.new_zeros(len(similarity), n_classes)
    return votes.scatter_add_(1, labels[nearest], weight).argmax(dim=1)


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k largest in each row; of equal ones the first, on which `topk` is silent."""
    largest, nearest = _topk(similarity, min(k + 1, similarity.shape[1]))
    last = largest[:, k - 1 : k]
    tied = (largest[:, k:] == last).any(dim=1)
    nearest = nearest[:, :k]
    if tied.any():
        rows, last = similarity[tied], last[tied]
        above, level = rows > last, rows == last
        room = k - above.sum(dim=1, keepdim=True)
        nearest[tied] = (above | level & (level.cumsum(dim=1) <= room)).nonzero()[:, 1].view(-1, k)
    return nearest


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
