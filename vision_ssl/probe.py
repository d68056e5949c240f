"""Probes: how well a simple classifier on frozen features tells classes apart, and `evaluate`, which knows them all.

What is fitted is fitted on training images and scored on others. `resubstitution` scores on the images that it was
fitted on: it shows how well a classifier memorises, not how good the features are.
"""

import os
import warnings
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from .clustering import cluster
from .data import Source, Split
from .errors import DataError, RecipeError
from .features import Features, extract
from .fewshot import SHOTS, fewshot
from .linear_sgd import STUDY_B, SWEEP, SGDProbe, sgd_classifier
from .logistic import Classifier, choose_l2, logistic_regression
from .neighbours import Metric, knn
from .options import Protocol
from .pairs import check_fit, check_pair, in_top, report
from .report import RESUBSTITUTION, Report
from .retrieval import retrieval

SGD_PROBES = {probe.protocol: probe for probe in (SWEEP, STUDY_B)}

MEMORISING_L2 = 1e-4  # of resubstitution


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
    labels = check_fit(features, "features")
    settings = {"l2": MEMORISING_L2}
    classifier = logistic_regression(features.features, labels, len(features.classes), settings["l2"])
    return _linear_report(RESUBSTITUTION, classifier, features, features, settings, seed)


def evaluate(
    encoder: nn.Module,
    *,
    train: "Source | Features | None" = None,
    val: "Source | Features | None" = None,
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
        protocol: "linear"; "linear-sgd" or "linear-sgd-study-b", which train it by SGD; "fewshot-5" and its like, on
            few labels; "knn" or "retrieval", which with one of the two alone leave one image out at a time;
            "cluster", which uses no labels to fit; or "resubstitution", which fits and scores on the same images. The
            last two never open `train` where there is a `val`.
        k: Neighbours that vote in "knn".
        temperature: Of their votes; see `knn`.
        metric: By which they are near; see `knn`.
        classes: Only the first so many classes by name take part; by default all.
        device: Where the encoder and SGD compute; by default where the encoder is, and on the CPU.
        cache_dir: Where the decoded images are kept.
        seed: See the protocol.

    Raises:
        DataError: A source is missing, cannot be read or has no labels, or the two do not fit together.
        RecipeError: There is no such protocol.
    """
    given: dict[Split, Source | Features | None] = {"train": train, "val": val}

    def features(split: Split) -> Features:
        source = given[split]
        if source is None:
            raise DataError(f"{split}=None: expected labelled images, for the protocol {protocol!r}")
        return labelled_features(encoder, source, split, classes=classes, device=device, cache_dir=cache_dir)

    if protocol not in get_args(Protocol):
        raise RecipeError(f"protocol={protocol!r}: expected one of {', '.join(get_args(Protocol))}")
    if protocol in ("cluster", RESUBSTITUTION):
        measure = cluster if protocol == "cluster" else resubstitution
        return measure(features("train" if val is None else "val"), seed=seed)
    if protocol in ("knn", "retrieval"):
        splits: list[Split] = [split for split, source in given.items() if source is not None] or ["val"]
        parts = [features(split) for split in splits]
        if protocol == "retrieval":
            return retrieval(*parts, seed=seed)
        return knn(*parts, k=k, temperature=temperature, metric=metric, seed=seed)
    fit, scored = features("train"), features("val")
    if protocol in SGD_PROBES:
        return linear_sgd(fit, scored, probe=SGD_PROBES[protocol], device=device, seed=seed)
    if protocol in SHOTS:
        return fewshot(fit, scored, protocol=protocol, seed=seed)
    return linear(fit, scored, seed=seed)


def labelled_features(
    encoder: nn.Module,
    source: "Source | Features",
    split: Split,
    *,
    classes: int | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Features:
    """Features with labels, of a source or as they are, of all classes or the first so many; see `evaluate`."""
    found = source
    if not isinstance(found, Features):
        found = extract(encoder, found, split=split, device=device, cache_dir=cache_dir, require_labels=True)
    return found if classes is None else found.first_classes(classes)


def _linear_report(
    protocol: str, classifier: Classifier, train: Features, val: Features, settings: dict[str, Any], seed: int
) -> Report:
    labels, targets = cast(Tensor, train.labels), cast(Tensor, val.labels)
    logits = classifier.logits(val.features)
    return report(
        protocol,
        logits.argmax(dim=1),
        train,
        val,
        settings,
        seed,
        top5=in_top(logits, targets),
        train_accuracy=100 * float((classifier.predict(train.features) == labels).double().mean()),
        train_loss=classifier.cross_entropy(train.features, labels),
    )
