"""Linear classifiers on random crops of the images: the probes of MAE's and SimCLR's own papers."""

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
from .logistic import Classifier
from .optim import LARS, parameter_groups, schedule_factor

CROPPED = (0.08, 1.0)  # share of the area (Szegedy et al. 2015, section 6), as both papers have it
ENCODED = 256  # images at a time


@dataclass(frozen=True, kw_only=True)
class CropProbe:
    """How a linear classifier is trained on random, mirrored crops, without weight decay.

    The learning rate is `base_lr * batch_size / 256`; it follows a half cosine to zero after a linear warm-up. Images
    that fill no batch are left out of an epoch, other ones each time.

    Attributes:
        protocol: What a report calls it.
        optimizer: `lars`, or `nesterov`: SGD with Nesterov's momentum. The momentum is 0.9.
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


# He et al. 2022, appendix A.1, table 10.
MAE_PROBE = CropProbe(protocol="linear-sgd-mae", optimizer="lars", batch_size=16384, warmup_epochs=10, batch_norm=True)
# Chen et al. 2020, appendices B.5 and B.6.
SIMCLR_PROBE = CropProbe(protocol="linear-sgd-simclr", optimizer="nesterov", batch_size=4096)


def crop_classifier(
    forward: Callable[[Tensor], Tensor],
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
        images: Labelled images, at least two.
        preprocess: Of the encoder.
        probe: How the classifier is trained.
        seed: Of the weights, the batches and the crops.
        device: Where to compute.

    Returns:
        The classifier, on the CPU, and its settings.
    """
    labels = cast(Tensor, images.labels)
    batch_size = min(probe.batch_size, len(images))
    lr = probe.base_lr * batch_size / 256
    dim = _features(forward, images.pixels[:1], preprocess, device, 0).shape[1]
    layer = nn.Linear(dim, len(images.classes))
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    norm = nn.BatchNorm1d(dim, affine=False) if probe.batch_norm else nn.Identity()
    head = nn.Sequential(norm, layer).to(device)
    optimizer = (
        LARS(parameter_groups(head, 0.0), lr)
        if probe.optimizer == "lars"
        else SGD(head.parameters(), lr=lr, momentum=0.9, nesterov=True)
    )
    batches = len(images) // batch_size
    for step in tqdm(range(probe.epochs * batches), f"{probe.protocol} on {images.name}", disable=None, delay=3):
        if step % batches == 0:
            order = torch.randperm(len(images), generator=generator)
        rows = order[step % batches * batch_size :][:batch_size]
        crop_seed = int(torch.randint(2**62, (), generator=generator))
        features = _features(forward, images.pixels[rows], preprocess, device, crop_seed)
        factor = schedule_factor(
            step,
            steps=probe.epochs * batches,
            warmup_steps=probe.warmup_epochs * batches,
            warmup="linear",
            schedule="cosine",
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        F.cross_entropy(head(features), labels[rows].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _folded(head.cpu()), asdict(probe) | {"batch_size": batch_size, "lr": lr, "crop": list(CROPPED)}


@torch.no_grad()
def _features(
    forward: Callable[[Tensor], Tensor], pixels: Tensor, preprocess: Preprocess, device: torch.device, seed: int
) -> Tensor:
    """Features float32 (B, D) of a random crop of each of uint8 images (B, C, S, S)."""
    found = []
    for start in range(0, len(pixels), ENCODED):
        rows = slice(start, start + ENCODED)
        draws = Draws(seed, rows=rows, total=len(pixels), device=device)
        boxes = random_boxes(draws, *pixels.shape[2:], scale=CROPPED)
        part, flips = pixels[rows].to(device), draws.chance(0.5)
        crops = crop_resize(part, boxes, flips, size=preprocess.size, interpolation="bicubic")
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
