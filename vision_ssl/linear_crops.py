"""Linear classifiers on random crops of the images: the probes of MAE's and SimCLR's own papers."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from tqdm import tqdm

from .augment import Draws, crop_resize, random_boxes
from .data import ImageSet, Preprocess, normalise
from .device import brought_near
from .errors import TrainingError
from .features import images_at_a_time
from .logistic import Classifier
from .optim import LARS, parameter_groups, schedule_factor

CROPPED = (0.08, 1.0)  # share of the area (Szegedy et al. 2015, section 6)
MOMENTUM = 0.9
NORM_EPS = 1e-6  # of MAE's code


@dataclass(frozen=True, kw_only=True)
class CropProbe:
    """How a linear classifier is trained on random, mirrored crops, without weight decay.

    Crops are of the images as the encoder sees them: centre squares of its size. The learning rate is
    `base_lr * batch_size / 256`; it follows a half cosine to zero after a linear warm-up. Images that fill no batch are
    left out of an epoch, other ones each time. Where a paper is silent (the schedule of SimCLR, the scale and mirroring
    of MAE's crops), this is what its authors' code does.

    Attributes:
        protocol: What a report calls it.
        optimizer: `lars`, or `nesterov`: SGD with Nesterov's momentum.
        base_lr: Learning rate per 256 images.
        batch_size: Images of a step; of fewer images, all.
        epochs: Passes over the training images.
        warmup_epochs: Passes until the learning rate is reached.
        batch_norm: A BatchNorm without affine parameters before the linear layer.
    """

    protocol: str
    optimizer: Literal["lars", "nesterov"]
    base_lr: float = 0.1
    batch_size: int
    epochs: int = 90
    warmup_epochs: int = 0
    batch_norm: bool = False


# He et al. 2022, appendix A.1, table 10. There the features are the class token.
MAE_PROBE = CropProbe(protocol="linear-sgd-mae", optimizer="lars", batch_size=16384, warmup_epochs=10, batch_norm=True)
# Chen et al. 2020, appendices B.5 and B.6.
SIMCLR_PROBE = CropProbe(protocol="linear-sgd-simclr", optimizer="nesterov", batch_size=4096)


def crop_classifier(
    forward: Callable[[Tensor], Tensor],
    dim: int,
    images: ImageSet,
    preprocess: Preprocess,
    probe: CropProbe,
    *,
    seed: int,
    device: torch.device,
) -> tuple[Classifier, dict[str, Any]]:
    """Train a linear classifier on features of random crops, other ones in each epoch.

    Features are not kept: the encoder reads every image once an epoch.

    Args:
        forward: Makes features (B, D) of normalised images (B, C, S, S), in eval mode, on the device.
        dim: Width D of the features.
        images: Labelled images, at least two.
        preprocess: Of the encoder.
        probe: How the classifier is trained.
        seed: Of the weights, the batches and the crops.
        device: Where to compute.

    Returns:
        The classifier, on the CPU, and its settings.

    Raises:
        TrainingError: It has weights that are not finite.

    Warns:
        UserWarning: There are fewer images than the batch has.
    """
    batch_size = min(probe.batch_size, len(images))
    if batch_size < probe.batch_size:
        warnings.warn(
            f"{probe.protocol}: {len(images):,} images make a single batch and {probe.epochs} steps, of settings that "
            f"are made for batches of {probe.batch_size:,}: expect less of it than of protocol 'linear'",
            stacklevel=4,
        )
    pixels = brought_near(images.pixels, device)
    labels = cast(Tensor, images.labels).to(pixels.device)
    generator = torch.Generator().manual_seed(seed)
    head = _random_head(dim, len(images.classes), probe, generator).to(device)
    lr = probe.base_lr * batch_size / 256
    optimizer = (
        LARS(parameter_groups(head, 0.0), lr, momentum=MOMENTUM)
        if probe.optimizer == "lars"
        else SGD(head.parameters(), lr=lr, momentum=MOMENTUM, nesterov=True)
    )
    batches = len(images) // batch_size
    for step in tqdm(range(probe.epochs * batches), f"{probe.protocol} on {images.name}", disable=None, delay=3):
        if step % batches == 0:
            order = torch.randperm(len(images), generator=generator)
        rows = order[step % batches * batch_size :][:batch_size].to(pixels.device)
        crop_seed = int(torch.randint(2**62, (), generator=generator))
        draws = Draws(crop_seed, rows=slice(None), total=batch_size, device=device)
        features = _features(forward, pixels, rows, preprocess, draws)
        factor = schedule_factor(
            step,
            steps=probe.epochs * batches,
            warmup_steps=probe.warmup_epochs * batches,
            warmup="linear",
            schedule="cosine",
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        with torch.autocast(device.type, enabled=False):
            F.cross_entropy(head(features), labels[rows].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier = _folded(head.cpu())
    if not classifier.weight.isfinite().all():
        raise TrainingError(f"{probe.protocol}: its weights are not finite after {probe.epochs} epochs")
    facts = {"batch_size": batch_size, "lr": lr, "momentum": MOMENTUM, "crop": list(CROPPED), "flip": 0.5}
    return classifier, asdict(probe) | facts


def _random_head(dim: int, n_classes: int, probe: CropProbe, generator: torch.Generator) -> nn.Sequential:
    layer = nn.utils.skip_init(nn.Linear, dim, n_classes)  # which would draw from the global generator
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, NORM_EPS, affine=False) if probe.batch_norm else nn.Identity(), layer)


@torch.no_grad()
def _features(
    forward: Callable[[Tensor], Tensor], pixels: Tensor, rows: Tensor, preprocess: Preprocess, draws: Draws
) -> Tensor:
    """Features float32 (B, D) of a random crop of each of the images at `rows` (B,) of uint8 (n, C, S, S)."""
    device = draws.device
    boxes, flips = random_boxes(draws, *pixels.shape[2:], scale=CROPPED), draws.chance(0.5)
    found, at_a_time = [], images_at_a_time(preprocess, device)
    for chosen, *crop in zip(*(every.split(at_a_time) for every in (rows, boxes, flips)), strict=True):
        part = pixels.index_select(0, chosen).to(device)
        with torch.autocast(device.type, enabled=False):  # the caller's is for the encoder
            crops = crop_resize(part, *crop, size=preprocess.size, interpolation="bicubic")
        found.append(forward(normalise(crops, preprocess.mean, preprocess.std)).float())
    return torch.cat(found)


def _folded(head: nn.Sequential) -> Classifier:
    """The trained layer, with its BatchNorm folded into it."""
    norm, layer = head
    weight, bias = cast(nn.Linear, layer).weight.detach().T, cast(nn.Linear, layer).bias.detach()
    mean, scale = torch.zeros(len(weight)), torch.ones(len(weight))
    if isinstance(norm, nn.BatchNorm1d):
        mean, scale = cast(Tensor, norm.running_mean), (cast(Tensor, norm.running_var) + norm.eps).rsqrt()
    return Classifier(mean, weight * scale[:, None], bias)
