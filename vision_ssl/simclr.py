"""SimCLR (Chen et al. 2020): two views, a projector, and the NT-Xent loss."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import (
    Draws,
    color_jitter,
    crop_resize,
    random_blur,
    random_boxes,
    random_grayscale,
)
from .data import channel_statistics, normalise
from .distributed import gather, rank
from .encoders import feature_dim

if TYPE_CHECKING:
    from .recipes import SimCLR


def two_views(recipe: "SimCLR", images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Two independent views of each image (Chen et al. 2020, appendix A).

    Args:
        recipe: The strengths of the augmentations.
        images: uint8 (B, C, H, W).
        draws: Source of random numbers.

    Returns:
        Two normalised float32 batches (B, C, S, S).
    """
    return _view(recipe, images, draws), _view(recipe, images, draws)


def _view(recipe: "SimCLR", images: Tensor, draws: Draws) -> Tensor:
    height, width = images.shape[-2:]
    boxes = random_boxes(draws, height, width, scale=recipe.crop_scale)
    view = crop_resize(images, boxes, draws.chance(recipe.flip), size=recipe.image_size)
    view = color_jitter(draws, view, recipe.jitter, probability=recipe.jitter_probability)
    view = random_grayscale(draws, view, recipe.grayscale)
    kernel_size = recipe.blur_kernel or recipe.image_size // 20 * 2 + 1
    view = random_blur(draws, view, probability=recipe.blur, kernel_size=kernel_size)
    return normalise(view, *channel_statistics(recipe.channels))


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1), over all processes.

    Args:
        first: (N, P) projections of the first views of this process; scale does not matter.
        second: (N, P) projections of the second views, in the same order.
        temperature: Divides the cosine similarities.

    Returns:
        Mean loss, float32, of this process's 2 N views, each against the other 2 N W - 1 of all W processes.
    """
    queries = F.normalize(torch.cat([first, second]).float(), dim=1)
    count = first.shape[0]
    everything = gather(queries)  # rank-major: 2 N rows of each process
    with torch.autocast(queries.device.type, enabled=False):  # which would multiply in bfloat16
        logits = queries @ everything.mT / temperature
    own = torch.arange(2 * count, device=logits.device)
    offset = rank() * 2 * count
    logits = logits.scatter(1, (own + offset)[:, None], float("-inf"))
    partner = (own + count) % (2 * count) + offset
    return F.cross_entropy(logits, partner)


class SimCLRModel(nn.Module):
    """An encoder, a projector, and the loss between two views.

    Args:
        encoder: Maps (B, C, S, S) to (B, D).
        hidden: Hidden width of the projector.
        dim: Width of its output.
        norm: BatchNorm after each of its linear layers.
        temperature: Of the loss.
    """

    def __init__(self, encoder: nn.Module, *, hidden: int, dim: int, norm: bool, temperature: float) -> None:
        super().__init__()
        self.encoder = encoder
        width = feature_dim(encoder)
        layers: list[nn.Module] = [nn.Linear(width, hidden, bias=not norm)]
        if norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers += [nn.ReLU(inplace=True), nn.Linear(hidden, dim, bias=not norm)]
        if norm:
            layers.append(nn.BatchNorm1d(dim))
        self.head = nn.Sequential(*layers)
        self.temperature = temperature

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of two batches of views (B, C, S, S), and metrics.

        Both views pass through the encoder in one batch, so that BatchNorm sees 2 B images: one pass is
        faster, and its statistics cannot tell the two views apart.
        """
        features = self.encoder(torch.cat([first, second]))
        projections = self.head(features)
        loss = nt_xent(projections[: len(first)], projections[len(first) :], self.temperature)
        return loss, {"feature_std": F.normalize(features.detach().float(), dim=1).std(dim=0).mean()}


def build_simclr(recipe: "SimCLR") -> SimCLRModel:
    """Build the model that a recipe describes, with random weights."""
    encoder = recipe.encoder_spec().build()
    return SimCLRModel(
        encoder,
        hidden=recipe.projector_hidden or feature_dim(encoder),
        dim=recipe.projector_dim,
        norm=recipe.projector_norm,
        temperature=recipe.temperature,
    )
