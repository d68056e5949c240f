"""Probes: how well a simple classifier on frozen features tells classes apart, and `evaluate`, which knows them all.

What is fitted is fitted on training images and scored on others. `resubstitution` scores on the images that it was
fitted on: it shows how well a classifier memorises, not how good the features are.
"""

import os
import warnings
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .attentive import attentive
from .clustering import cluster
from .data import Source, Split
from .errors import DataError, RecipeError
from .features import Features, extract, extract_with
from .fewshot import SHOTS, fewshot
from .linear_sgd import STUDY_B, SWEEP, SGDProbe, sgd_classifier
from .logistic import Classifier, choose_l2, logistic_regression
from .neighbours import Metric, knn
from .options import Protocol
from .pairs import check_fit, check_pair, in_top, report
from .pooling import DEPTHS, Choice, Pooling, candidates, check_pooling, choose_pooling
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
    pooling: Pooling | Literal["choose"] = "avg",
    layers: int = 1,
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
        protocol: "linear"; "linear-sgd" or "linear-sgd-study-b", which train it by SGD; "attentive", which pools a
            ViT's tokens by learned attention and needs images; "fewshot-5" and its like, on few labels; "knn" or
            "retrieval", which with one of the two alone leave one image out at a time; "cluster", which uses no
            labels to fit; or "resubstitution", which fits and scores on the same images. The last two never open
            `train` where there is a `val`.
        k: Neighbours that vote in "knn".
        temperature: Of their votes; see `knn`.
        metric: By which they are near; see `knn`.
        pooling: How a ViT's tokens become features, as in `extract`. "choose" tries all ways, of the last layer and of
            the last four, by a linear classifier on a held-out fifth of the training images; the report's settings
            say what was chosen.
        layers: How many of a ViT's last layers are averaged, unless that is chosen too.
        classes: Only the first so many classes by name take part; by default all.
        device: Where the encoder and SGD compute; by default where the encoder is, and on the CPU.
        cache_dir: Where the decoded images are kept.
        seed: See the protocol.

    Raises:
        DataError: A source is missing, cannot be read or has no labels, or the two do not fit together.
        RecipeError: There is no such protocol, or the encoder cannot be pooled so.
    """
    if protocol not in get_args(Protocol):
        raise RecipeError(f"protocol={protocol!r}: expected one of {', '.join(get_args(Protocol))}")
    given: dict[Split, Source | Features | None] = {"train": train, "val": val}
    where: dict[str, Any] = {"classes": classes, "device": device, "cache_dir": cache_dir}
    facts: dict[str, Any] = {}
    pooled = [split for split, source in given.items() if isinstance(source, Features)]
    if pooled and (pooling, layers) != ("avg", 1):
        raise DataError(f"{pooled[0]}: features, which are pooled already: expected images for pooling={pooling!r}")
    if pooling == "choose":
        if train is None or val is None or isinstance(train, Features):  # the last for mypy alone
            raise DataError("pooling='choose': expected images as train and as val, since it is chosen on train alone")
        given["train"], choice = _choose_pooling(encoder, train, seed=seed, **where)
        pooling, layers, facts = choice.pooling, choice.layers, {"pooling_losses": choice.losses}
    where |= {"pooling": pooling, "layers": layers}
    if facts or (pooling, layers) != ("avg", 1):
        facts |= {"pooling": pooling, "layers": layers}

    def features(split: Split) -> Features:
        source = given[split]
        if source is None:
            raise DataError(f"{split}=None: expected labelled images, for the protocol {protocol!r}")
        return labelled_features(encoder, source, split, **where)

    if protocol in ("cluster", RESUBSTITUTION):
        measure = cluster if protocol == "cluster" else resubstitution
        found = measure(features("train" if val is None else "val"), seed=seed)
    elif protocol in ("knn", "retrieval"):
        splits: list[Split] = [split for split, source in given.items() if source is not None] or ["val"]
        parts = [features(split) for split in splits]
        if protocol == "retrieval":
            found = retrieval(*parts, seed=seed)
        else:
            found = knn(*parts, k=k, temperature=temperature, metric=metric, seed=seed)
    elif protocol == "attentive":
        if train is None or val is None or isinstance(train, Features) or isinstance(val, Features) or facts:
            raise DataError("protocol='attentive': expected images as train and as val, and pooling='avg'")
        found = attentive(encoder, train=train, val=val, classes=classes, device=device, cache_dir=cache_dir, seed=seed)
    elif protocol in SGD_PROBES:
        probe = SGD_PROBES[protocol]
        found = linear_sgd(features("train"), features("val"), probe=probe, device=device, seed=seed)
    elif protocol in SHOTS:
        found = fewshot(features("train"), features("val"), protocol=protocol, seed=seed)
    else:
        found = linear(features("train"), features("val"), seed=seed)
    return replace(found, settings={**found.settings, **facts})


def labelled_features(
    encoder: nn.Module,
    source: "Source | Features",
    split: Split,
    *,
    classes: int | None = None,
    **options: Any,
) -> Features:
    """Features with labels, of a source or as they are, of all classes or the first so many.

    Args:
        encoder: As in `extract`.
        source: Images, or their features.
        split: Which split of the source, where it has several.
        classes: Only the first so many classes by name.
        **options: Of `extract`.
    """
    found = (
        source
        if isinstance(source, Features)
        else extract(encoder, source, split=split, require_labels=True, **options)
    )
    return found if classes is None else found.first_classes(classes)


def _choose_pooling(
    encoder: nn.Module,
    train: "Source",
    *,
    classes: int | None,
    device: str | torch.device | None,
    cache_dir: str | os.PathLike[str] | None,
    seed: int,
) -> tuple[Features, Choice]:
    """Features of the training images, pooled as is best on a held-out part of them, by one pass of the encoder."""
    check_pooling(encoder, "both", max(DEPTHS))
    forward = partial(candidates, encoder)
    every = extract_with(
        encoder, forward, train, split="train", device=device, cache_dir=cache_dir, require_labels=True
    )
    part = every if classes is None else every.first_classes(classes)
    choice = choose_pooling(part.features, check_fit(part, "train"), len(part.classes), seed)
    return every.pooled(choice.pooling, choice.layers, choice.columns), choice


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
