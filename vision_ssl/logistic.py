"""Multinomial logistic regression, solved to convergence: the classifier of the linear probe."""

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DataError

# From strong to weak, two values a decade.
L2_GRID = tuple(10 ** (1 - step / 2) for step in range(15))
HELD_OUT = 0.2  # of the training images, to choose from the grid
SELECTION_IMAGES = 20_000  # at most, for the choice; the final fit has them all
PATIENCE = 2  # values of the grid in a row that may be worse than the best before the rest is left out

BURST = 10  # iterations of the solver between two looks at its progress
MAX_BURSTS = 200
TOLERANCE = 1e-5  # relative gain of a burst below which the solver has converged

BLOCK = 1 << 22  # elements of the largest temporary matrix: 16 MB


class Classifier(NamedTuple):
    """A linear classifier: logits are (features - mean) @ weight + bias.

    Attributes:
        mean: float32 (D,).
        weight: float32 (D, K).
        bias: float32 (K,).
    """

    mean: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Return the class with the largest logit, int64 (n,), for features (n, D)."""
        return torch.cat([self._logits(block).argmax(dim=1) for block in self._blocks(features)])

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits, float32 (n, K), of features (n, D)."""
        return torch.cat([self._logits(block) for block in self._blocks(features)])

    def cross_entropy(self, features: Tensor, labels: Tensor) -> float:
        """Return the mean cross-entropy, nats, of features (n, D) with labels int64 (n,)."""
        blocks = zip(self._blocks(features), self._blocks(labels), strict=True)
        total = sum(F.cross_entropy(self._logits(block), target, reduction="sum").item() for block, target in blocks)
        return total / len(labels)

    def _blocks(self, rows: Tensor) -> Iterator[Tensor]:
        yield from rows.split(max(1, BLOCK // max(self.weight.shape)))

    def _logits(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.weight + self.bias


def logistic_regression(features: Tensor, labels: Tensor, n_classes: int, l2: float) -> Classifier:
    """Fit multinomial logistic regression, to convergence, on the device of the features.

    It minimises the mean cross-entropy plus l2 / 2 * ||W||^2, where W acts on features that are standardised by
    their own mean and deviation (a constant one is left at 0), and the bias is free.

    Args:
        features: float32 (n, D).
        labels: int64 (n,), 0..n_classes - 1.
        n_classes: Number of classes K.
        l2: Strength of the penalty, above 0.

    Warns:
        UserWarning: The solver ran out of iterations; the accuracy may be a little low.
    """
    axes = _Axes.of(features)
    weight, bias = _minimise(axes.project(features), labels.to(features.device), l2, _Weights.zeros(axes, n_classes))
    return Classifier(axes.mean, axes.rotation @ weight, bias)


def choose_l2(features: Tensor, labels: Tensor, n_classes: int, seed: int) -> dict[str, Any]:
    """Find the l2 of the grid with the lowest cross-entropy on held-out images of the training set.

    From strong to weak, each fit starts where the one before ended. A penalty counts for less against more images:
    the l2 that is best for a part of the training set is scaled by the part's share.

    Args:
        features: float32 (n, D).
        labels: int64 (n,), 0..n_classes - 1, on the CPU.
        n_classes: Number of classes.
        seed: Of the held-out split, which is stratified by class.

    Returns:
        `l2` for all images, `l2_of_selection` for the `selection_fitted_on` images that were fitted on while
        `selection_scored_on` others were scored, with their cross-entropy (nats) as `selection_loss`, and
        `l2_at_grid_edge`: a value outside the grid may be better.

    Raises:
        DataError: No class has two images.
    """
    generator = torch.Generator().manual_seed(seed)
    part = torch.arange(len(labels))
    if len(labels) > SELECTION_IMAGES:
        part = part[_stratified(labels, SELECTION_IMAGES / len(labels), generator)]
    held = hold_out(labels[part], generator)
    fit, held_out = part[~held], part[held]
    axes = _Axes.of(features[fit])
    fit_features, held_features = axes.project(features[fit]), axes.project(features[held_out])
    fit_labels, held_labels = labels[fit].to(features.device), labels[held_out].to(features.device)
    weights = _Weights.zeros(axes, n_classes)
    losses: list[float] = []
    for l2 in L2_GRID:
        weights = _minimise(fit_features, fit_labels, l2, weights)
        logits = torch.addmm(weights.bias, held_features, weights.weight)
        losses.append(float(F.cross_entropy(logits, held_labels)))
        best = losses.index(min(losses))
        if len(losses) - 1 - best == PATIENCE:
            break
    return {
        "l2": L2_GRID[best] * len(fit) / len(labels),
        "l2_of_selection": L2_GRID[best],
        "l2_at_grid_edge": best in (0, len(L2_GRID) - 1),
        "selection_fitted_on": len(fit),
        "selection_scored_on": len(held_out),
        "selection_loss": losses[best],
    }


def hold_out(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mask (n,) of the training images, `HELD_OUT` of each class, by which a setting is chosen.

    Raises:
        DataError: No class has two images.
    """
    held = _stratified(labels, HELD_OUT, generator)
    if not held.any():
        raise DataError(
            f"train: {len(labels):,} images of as many classes, expected two of a class, so that one can be held "
            "out to choose by"
        )
    return held


def _stratified(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Mask (n,) of a random fraction of each class: of two or more images at least one, and never all."""
    return draw(labels, share_of_each(labels.bincount(), fraction), generator)


def share_of_each(counts: Tensor, fraction: float) -> Tensor:
    """How many of `counts` images a fraction of each class is: of two or more at least one, and never all."""
    return (fraction * counts).round().long().clamp(min=1).minimum(counts - 1).clamp(min=0)


def draw(labels: Tensor, quota: Tensor, generator: torch.Generator) -> Tensor:
    """Mask (n,) of random images, `quota` (K,) of each class."""
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[labels[shuffled].argsort(stable=True)]  # class by class
    counts = labels.bincount(minlength=len(quota))
    position = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order] = position < quota[labels[order]]
    return chosen


class _Axes(NamedTuple):
    """Standardisation, then a rotation to the r = min(n, D) principal axes: (features - mean) @ rotation.

    This changes neither what a linear classifier can do nor the norm of its weights, but it makes the curvature of
    the objective nearly diagonal.

    Attributes:
        mean: float32 (D,).
        rotation: float32 (D, r).
    """

    mean: Tensor
    rotation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "_Axes":
        std, mean = torch.std_mean(features, dim=0, correction=0)
        constant = std <= 1e-6 * mean.abs()  # what rounding leaves of a constant must not be blown up
        scale = torch.where(constant, 0.0, 1 / std)
        basis = torch.diag(scale)
        if len(features) < len(mean):  # n images span no more than n dimensions
            basis = scale[:, None] * torch.linalg.qr(((features - mean) * scale).T).Q
        standard = cls(mean, basis).project(features)
        return cls(mean, basis @ torch.linalg.eigh(standard.T @ standard).eigenvectors)

    def project(self, features: Tensor) -> Tensor:
        projected = features.new_empty(len(features), self.rotation.shape[1])
        rows = max(1, BLOCK // len(self.mean))
        for source, target in zip(features.split(rows), projected.split(rows), strict=True):
            torch.mm(source - self.mean, self.rotation, out=target)
        return projected


class _Weights(NamedTuple):
    weight: Tensor
    bias: Tensor

    @classmethod
    def zeros(cls, axes: _Axes, n_classes: int) -> "_Weights":
        return cls(axes.mean.new_zeros(axes.rotation.shape[1], n_classes), axes.mean.new_zeros(n_classes))


def _minimise(features: Tensor, labels: Tensor, l2: float, start: _Weights) -> _Weights:
    """Minimise mean cross-entropy + l2 / 2 * ||weight||^2 by L-BFGS, from `start`, on features from `_Axes`."""
    n_classes = len(start.bias)
    rows = max(1, BLOCK // n_classes)
    # While no class is favoured, the curvature along an axis is about this: in these units it is about 1.
    unit = (features.square().mean(dim=0) / n_classes + l2).rsqrt()[:, None]
    scaled, bias = start.weight / unit, start.bias.clone()

    def objective() -> Tensor:
        weight = scaled * unit
        loss = 0.5 * l2 * weight.double().square().sum()
        weight_grad, bias_grad = l2 * weight, torch.zeros_like(bias)
        for block, target in zip(features.split(rows), labels[:, None].split(rows), strict=True):
            log_p = torch.addmm(bias, block, weight).log_softmax(dim=1)
            loss -= log_p.gather(1, target).double().sum() / len(features)
            error = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype))
            weight_grad.addmm_(block.T, error, alpha=1 / len(features))
            bias_grad += error.sum(dim=0) / len(features)
        scaled.grad, bias.grad = weight_grad * unit, bias_grad
        return loss

    solver = torch.optim.LBFGS([scaled, bias], max_iter=BURST, line_search_fn="strong_wolfe")
    before = math.inf
    for _ in range(MAX_BURSTS):
        loss = float(solver.step(objective))  # what it was before this burst
        if before - loss <= TOLERANCE * loss:
            break
        before = loss
    else:
        warnings.warn(f"the linear probe did not converge in {BURST * MAX_BURSTS:,} iterations", stacklevel=2)
    return _Weights(scaled * unit, bias)
