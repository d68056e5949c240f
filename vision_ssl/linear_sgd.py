"""Linear classifiers by stochastic gradient descent: several learning rates at once, as the columns of one matrix."""

from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .logistic import Classifier, hold_out
from .optim import schedule_factor


@dataclass(frozen=True, kw_only=True)
class SGDProbe:
    """How a linear classifier is trained.

    The learning rate follows a half cosine to zero, one value an epoch. The weight decay is added to the gradient of
    weights and biases, as torch's SGD does.

    Attributes:
        protocol: What a report calls it.
        lrs: Learning rates to choose from, in rising order.
        epochs: Passes over the training features.
        batch_size: Images of a step, at least 2.
        momentum: Factor of the momentum.
        weight_decay: Factor of the weights in the gradient.
        batch_norm: A BatchNorm without affine parameters before the linear layer (He et al. 2022, appendix A.1).
    """

    protocol: str
    lrs: tuple[float, ...]
    epochs: int = 40
    batch_size: int = 512
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_norm: bool = True


SWEEP = SGDProbe(protocol="linear-sgd", lrs=tuple(10 ** (step / 2) for step in range(-6, 3)))
STUDY_B = SGDProbe(protocol="linear-sgd-study-b", lrs=(0.1,), weight_decay=1e-4)


def sgd_classifier(
    features: Tensor, labels: Tensor, n_classes: int, probe: SGDProbe, *, seed: int, device: str | torch.device
) -> tuple[Classifier, dict[str, Any]]:
    """Train a linear classifier, with the learning rate that is most accurate on held-out images of the training set.

    Of equally accurate learning rates the lowest is taken; the classifier is then trained on all images. A single
    learning rate is no choice, and nothing is held out.

    Args:
        features: float32 (n, D).
        labels: int64 (n,), 0..n_classes - 1.
        n_classes: Number of classes K.
        probe: How it is trained.
        seed: Of the held-out split, the weights and the batches; none of them depends on the device.
        device: Where to compute.

    Returns:
        The classifier, on the CPU, and its settings. Where there was a choice, these say whether `lr_at_grid_edge`,
        so that a value outside the grid may be better, how many images it was made with, and their accuracy (percent).

    Raises:
        DataError: There is a choice, but no class has two images.
    """
    settings = asdict(probe) | {"lr": probe.lrs[0]}
    if len(probe.lrs) > 1:
        held = hold_out(labels, torch.Generator().manual_seed(seed))
        candidates = _fit(features[~held], labels[~held], n_classes, probe, seed, device)
        hits = [int((candidate.predict(features[held]) == labels[held]).sum()) for candidate in candidates]
        best = hits.index(max(hits))
        settings |= {
            "lr": probe.lrs[best],
            "lr_at_grid_edge": best in (0, len(hits) - 1),
            "selection_fitted_on": int((~held).sum()),
            "selection_scored_on": int(held.sum()),
            "selection_accuracy": 100 * hits[best] / int(held.sum()),
        }
    [classifier] = _fit(features, labels, n_classes, replace(probe, lrs=(settings["lr"],)), seed, device)
    return classifier, settings


def _fit(
    features: Tensor, labels: Tensor, n_classes: int, probe: SGDProbe, seed: int, device: str | torch.device
) -> list[Classifier]:
    """A classifier for each learning rate; all start from the weights of one `nn.Linear` and see the same batches."""
    generator = torch.Generator().manual_seed(seed)
    dim, repeats = features.shape[1], len(probe.lrs)
    bound = dim**-0.5
    start = torch.empty(dim + 1, n_classes).uniform_(-bound, bound, generator=generator)  # the last row is the bias
    weight = start.repeat(1, repeats).to(device)
    momentum = torch.zeros_like(weight)
    lrs = torch.tensor(probe.lrs, device=device).repeat_interleave(n_classes)
    norm = nn.BatchNorm1d(dim, affine=False, device=device)
    features, labels = features.to(device), labels.to(device)
    for epoch in range(probe.epochs):
        lr = lrs * schedule_factor(epoch, steps=probe.epochs, warmup_steps=0, warmup="linear", schedule="cosine")
        for rows in torch.randperm(len(labels), generator=generator).to(device).split(probe.batch_size):
            if len(rows) == 1:  # a rest of one image has no variance
                continue
            batch = norm(features[rows]) if probe.batch_norm else features[rows]
            batch = F.pad(batch, (0, 1), value=1.0)
            error = (batch @ weight).unflatten(1, (repeats, n_classes)).softmax(dim=2)
            error -= F.one_hot(labels[rows], n_classes)[:, None]  # now the gradient of the loss by the logits
            momentum.mul_(probe.momentum).addmm_(batch.T, error.flatten(1), alpha=1 / len(rows))
            momentum.add_(weight, alpha=probe.weight_decay)
            weight.sub_(lr * momentum)
    mean, scale = torch.zeros(dim), torch.ones(dim)
    if probe.batch_norm:
        mean, scale = cast(Tensor, norm.running_mean).cpu(), (cast(Tensor, norm.running_var) + norm.eps).rsqrt().cpu()
    return [Classifier(mean, part[:-1] * scale[:, None], part[-1]) for part in weight.cpu().split(n_classes, dim=1)]
