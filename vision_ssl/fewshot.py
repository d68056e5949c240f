"""Few labels: how good a classifier a handful of labelled images make of frozen features, on average."""

from typing import Any, cast

import torch
from torch import Tensor

from .cache import first_few
from .errors import DataError, RecipeError
from .features import Features
from .logistic import draw, logistic_regression, share_of_each
from .pairs import check_pair, in_top, report
from .report import Report

# What the protocols draw: so many images of each class, or such a share of them.
SHOTS: dict[str, int | float] = {
    "fewshot-1": 1,
    "fewshot-5": 5,
    "fewshot-10": 10,
    "fewshot-1-percent": 0.01,
    "fewshot-10-percent": 0.1,
}
DRAWS = 20


def fewshot(train: Features, val: Features, *, protocol: str, draws: int = DRAWS, seed: int = 0) -> Report:
    """Fit a linear classifier on a few labelled images, again and again; score each on the same others.

    Which images are drawn matters much: of each class so many, or such a share of them (at least one). The same seed
    draws the same images for any encoder. The classifier is that of `linear`, on features that are standardised by
    the drawn images alone. With too few of them to choose by, its l2 is 1 / n for n drawn images, which is C = 1 in
    scikit-learn's terms.

    Args:
        train: Features to draw from, with labels.
        val: Features of other images, with labels of the same classes.
        protocol: One of `SHOTS`.
        draws: How often images are drawn, at least 2.
        seed: Of the draws and the bootstrap.

    Returns:
        A report whose accuracy is the mean over the draws, `deviation` their sample standard deviation (points), and
        `settings["accuracies"]` each of them. Its interval is over the test images, not over the draws. `n_train` is
        the number of images of one draw.

    Raises:
        DataError: Labels are missing, the two do not fit together, or a class of `train` has too few images.
        RecipeError: There is no such protocol, or fewer than 2 draws.

    Warns:
        UserWarning: `val` has a class that `train` lacks, or all features are equal.
    """
    if protocol not in SHOTS:
        raise RecipeError(f"protocol={protocol!r}: expected one of {', '.join(SHOTS)}")
    if draws < 2:
        raise RecipeError(f"draws={draws}: expected at least 2, to tell how far they differ")
    labels, targets = check_pair(train, val), cast(Tensor, val.labels)
    shots = SHOTS[protocol]
    counts = labels.bincount(minlength=len(train.classes))
    if isinstance(shots, int):
        few = ((counts > 0) & (counts < shots)).nonzero()[:, 0].tolist()
        if few:
            names = first_few([train.classes[label] for label in few])
            raise DataError(f"train: fewer than {shots} images of {names}, expected as many of each class")
        quota = counts.clamp(max=shots)
    else:
        quota = share_of_each(counts, shots).maximum(counts.clamp(max=1))
    generator = torch.Generator().manual_seed(seed)
    l2 = 1 / int(quota.sum())
    predictions = torch.empty(draws, len(val), dtype=torch.int64)
    top5 = torch.empty(draws, len(val), dtype=torch.bool)
    for index in range(draws):
        drawn = draw(labels, quota, generator)
        classifier = logistic_regression(train.features[drawn], labels[drawn], len(train.classes), l2)
        logits = classifier.logits(val.features)
        predictions[index] = logits.argmax(dim=1)
        top5[index] = in_top(logits, targets)
    accuracies = 100 * (predictions == targets).double().mean(dim=1)
    settings: dict[str, Any] = {"shots": shots, "draws": draws, "l2": l2, "accuracies": accuracies.tolist()}
    scores = {"deviation": float(accuracies.std())}
    n_train = int(quota.sum())
    return report(protocol, predictions, train, val, settings, seed, top5=top5, n_train=n_train, scores=scores)
