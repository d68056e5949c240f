"""Probes: how well a simple classifier on frozen features tells classes apart, and `evaluate`, which knows them all.

What is fitted is fitted on training images and scored on others. `resubstitution` scores on the images that it was
fitted on: it shows how well a classifier memorises, not how good the features are.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .attentive import attentive
from .clustering import cluster
from .data import ImageSet, Preprocess, Source, Split
from .errors import DataError, RecipeError
from .features import Features, evaluating, extract, extract_with, images_for
from .fewshot import SHOTS, fewshot
from .leakage import warn_of_twins
from .linear_crops import MAE_PROBE, SIMCLR_PROBE, CropProbe, crop_classifier
from .linear_sgd import STUDY_B, SWEEP, SGDProbe, sgd_classifier
from .logistic import Classifier, choose_l2, logistic_regression
from .neighbours import Metric, knn
from .options import Protocol
from .pairs import check_fit, check_pair, in_top, report
from .pooling import DEPTHS, Choice, Pooling, candidates, check_pooling, choose_pooling, pool
from .report import RESUBSTITUTION, Report
from .retrieval import retrieval

SGD_PROBES = {probe.protocol: probe for probe in (SWEEP, STUDY_B)}
CROP_PROBES = {probe.protocol: probe for probe in (MAE_PROBE, SIMCLR_PROBE)}

MEMORISING_L2 = 1e-4  # of resubstitution


def linear(train: Features, val: Features, *, device: str | torch.device | None = None, seed: int = 0) -> Report:
    """Fit a linear classifier on training features, and score it on others.

    Features are standardised by the statistics of the training images. The classifier is multinomial logistic
    regression, solved to convergence; `logistic_regression` states its objective. Its l2 comes from a logarithmic
    grid by the cross-entropy on a held-out fifth of the training images, at most 20,000 of which take part in that
    choice; the classifier is then fitted on all. Validation images serve for nothing but the scores.

    Args:
        train: Features to fit on, with labels.
        val: Features of other images, with labels of the same classes.
        device: Where the solver works: on a GPU of CUDA, or otherwise the CPU, since others lack double precision.
        seed: Of the held-out split and the bootstrap.

    Raises:
        DataError: Labels are missing, or the two do not fit together.

    Warns:
        UserWarning: `val` has a class that `train` lacks, or the solver ran out of iterations.
    """
    labels = check_pair(train, val)
    n_classes = len(train.classes)
    with _solver(train.features, device) as features:
        settings = choose_l2(features, labels, n_classes, seed)
        classifier = logistic_regression(features, labels, n_classes, settings["l2"])
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


def resubstitution(features: Features, *, device: str | torch.device | None = None, seed: int = 0) -> Report:
    """Fit a linear classifier and score it on the very same images: a training accuracy.

    It exists to compare with work that reports such figures. The classifier is that of `linear`, with a penalty
    so weak that it memorises what it can.

    Args:
        features: Features to fit and score on, with labels.
        device: Where the solver works, as in `linear`.
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
    with _solver(features.features, device) as near:
        classifier = logistic_regression(near, labels, len(features.classes), settings["l2"])
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
        protocol: "linear"; "linear-sgd" or "linear-sgd-study-b", which train it by SGD; "linear-sgd-mae" or
            "linear-sgd-simclr", which do so on random crops with the settings of these papers (MAE's own features are
            `pooling="token"`), and "attentive", which pools tokens by learned attention: the three need images to train
            on, and the last to score on; "fewshot-5" and its like, on few labels; "knn" or "retrieval", which with one
            of the two alone leave one image out at a time; "cluster", which uses no labels to fit; or
            "resubstitution", which fits and scores on the same images. The last two never open `train` where there
            is a `val`.
        k: Neighbours that vote in "knn".
        temperature: Of their votes; see `knn`.
        metric: By which they are near; see `knn`.
        pooling: How a ViT's tokens become features, as in `extract`. "choose" tries all ways, of the last layer and of
            the last four, by a linear classifier on a held-out fifth of the training images; the report's settings
            say what was chosen.
        layers: How many of a ViT's last layers are averaged, unless that is chosen too.
        classes: Only the first so many classes by name take part, whose images are copied into memory; by default all.
        device: Where the encoder computes, by default where it is; and where a linear classifier is fitted to its
            features, by default on the CPU.
        cache_dir: Where the decoded images are kept.
        seed: See the protocol.

    Raises:
        DataError: A source is missing, cannot be read or has no labels, or the two do not fit together.
        RecipeError: There is no such protocol, or the encoder cannot be pooled so.

    Warns:
        UserWarning: Some images of `val` are in `train` too.
    """
    if protocol not in get_args(Protocol):
        raise RecipeError(f"protocol={protocol!r}: expected one of {', '.join(get_args(Protocol))}")
    if protocol in ("cluster", RESUBSTITUTION) and val is not None:
        train = None
    train = _opened(encoder, train, "train", classes, cache_dir)
    val = _opened(encoder, val, "val", classes, cache_dir)
    if isinstance(train, ImageSet) and isinstance(val, ImageSet):
        warn_of_twins(train, val)
    given: dict[Split, ImageSet | Features | None] = {"train": train, "val": val}
    facts: dict[str, Any] = {}
    pooled = [split for split, source in given.items() if isinstance(source, Features)]
    if pooled and (pooling, layers) != ("avg", 1):
        raise DataError(f"{pooled[0]}: features, which are pooled already: expected images for pooling={pooling!r}")
    if pooling == "choose":
        if val is None or not isinstance(train, ImageSet):
            raise DataError("pooling='choose': expected images as train and as val, since it is chosen on train alone")
        given["train"], choice = _choose_pooling(encoder, train, device=device, seed=seed)
        pooling, layers, facts = choice.pooling, choice.layers, {"pooling_losses": choice.losses}
    if facts or (pooling, layers) != ("avg", 1):
        facts |= {"pooling": pooling, "layers": layers}

    def features(split: Split) -> Features:
        source = given[split]
        if source is None:
            raise DataError(f"{split}=None: expected labelled images, for the protocol {protocol!r}")
        if isinstance(source, Features):
            return source
        return extract(encoder, source, pooling=pooling, layers=layers, device=device)

    if protocol in ("cluster", RESUBSTITUTION):
        alone = features("train" if val is None else "val")
        found = cluster(alone, seed=seed) if protocol == "cluster" else resubstitution(alone, device=device, seed=seed)
    elif protocol in ("knn", "retrieval"):
        splits: list[Split] = [split for split, source in given.items() if source is not None] or ["val"]
        parts = [features(split) for split in splits]
        if protocol == "retrieval":
            found = retrieval(*parts, seed=seed)
        else:
            found = knn(*parts, k=k, temperature=temperature, metric=metric, seed=seed)
    elif protocol == "attentive":
        if not isinstance(train, ImageSet) or not isinstance(val, ImageSet) or facts:
            raise DataError("protocol='attentive': expected images as train and as val, and pooling='avg'")
        found = attentive(encoder, train=train, val=val, device=device, seed=seed)
    elif protocol in CROP_PROBES:
        if not isinstance(train, ImageSet):
            raise DataError(f"protocol={protocol!r}: expected images as train, since it crops them anew in each epoch")
        parts = [features("train"), features("val")]
        forward = partial(pool, encoder, pooling=pooling, layers=layers)
        found = _linear_on_crops(encoder, forward, train, *parts, probe=CROP_PROBES[protocol], device=device, seed=seed)
    elif protocol in SGD_PROBES:
        probe = SGD_PROBES[protocol]
        found = linear_sgd(features("train"), features("val"), probe=probe, device=device, seed=seed)
    elif protocol in SHOTS:
        found = fewshot(features("train"), features("val"), protocol=protocol, seed=seed)
    else:
        found = linear(features("train"), features("val"), device=device, seed=seed)
    return replace(found, settings={**found.settings, **facts})


def _opened(
    encoder: nn.Module,
    source: "Source | Features | None",
    split: Split,
    classes: int | None,
    cache_dir: str | os.PathLike[str] | None,
) -> ImageSet | Features | None:
    """Images of a source at the size that the encoder takes, or features as they are, of the first so many classes."""
    if source is None:
        return None
    if isinstance(source, Features):
        return source if classes is None else source.first_classes(classes)
    return images_for(encoder, source, split=split, classes=classes, cache_dir=cache_dir, require_labels=True)[0]


def _choose_pooling(
    encoder: nn.Module, train: ImageSet, *, device: str | torch.device | None, seed: int
) -> tuple[Features, Choice]:
    """Features of the training images, pooled as is best on a held-out part of them, by one pass of the encoder."""
    check_pooling(encoder, "both", max(DEPTHS))
    every = extract_with(encoder, partial(candidates, encoder), train, device=device)
    choice = choose_pooling(every.features, check_fit(every, "train"), len(every.classes), seed)
    return every.pooled(choice.pooling, choice.layers, choice.columns), choice


def _linear_on_crops(
    encoder: nn.Module,
    forward: Callable[[Tensor], Tensor],
    images: ImageSet,
    train: Features,
    val: Features,
    *,
    probe: CropProbe,
    device: str | torch.device | None,
    seed: int,
) -> Report:
    """Train on crops of the images, whose features as they are give the training accuracy; score on others."""
    check_pair(train, val)
    preprocess = cast(Preprocess, encoder.preprocess)
    with evaluating(encoder, device) as where:
        dim = train.features.shape[1]
        classifier, settings = crop_classifier(forward, dim, images, preprocess, probe, seed=seed, device=where)
    return _linear_report(probe.protocol, classifier, train, val, settings, seed)


@contextmanager
def _solver(features: Tensor, device: str | torch.device | None) -> Iterator[Tensor]:
    """Features where logistic regression is to be solved, without the caller's autocast, which is for the encoder."""
    near = features.to(device) if torch.device(device or "cpu").type == "cuda" else features
    with torch.autocast(near.device.type, enabled=False):
        yield near


def _linear_report(
    protocol: str, classifier: Classifier, train: Features, val: Features, settings: dict[str, Any], seed: int
) -> Report:
    labels, targets = cast(Tensor, train.labels), cast(Tensor, val.labels)
    classifier = Classifier(*(tensor.cpu() for tensor in classifier))  # where all features are
    with torch.autocast("cpu", enabled=False):  # the caller's is for the encoder
        logits = classifier.logits(val.features)
        hits = classifier.predict(train.features) == labels
        train_loss = classifier.cross_entropy(train.features, labels)
    return report(
        protocol,
        logits.argmax(dim=1),
        train,
        val,
        settings,
        seed,
        top5=in_top(logits, targets),
        train_accuracy=100 * float(hits.double().mean()),
        train_loss=train_loss,
    )
