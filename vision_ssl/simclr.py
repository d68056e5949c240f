"""SimCLR (Chen et al. 2020): two views, a projector, and the NT-Xent loss."""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .augment import Draws, crop_resize, draw_blur, gaussian_blur, on_chosen, random_boxes
from .color import Jitter, color_jitter, random_grayscale
from .data import channel_statistics, normalise
from .distributed import gather, rank
from .encoders import feature_dim

if TYPE_CHECKING:
    from .recipes import SimCLR

BLOCK = 1 << 20  # similarities that are computed at a time: 4 MB


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
    channels, height, width = images.shape[1:]
    boxes = random_boxes(draws, height, width, scale=recipe.crop_scale)
    flips = draws.chance(recipe.flip)
    jitter = Jitter.draw(draws, recipe.jitter, probability=recipe.jitter_probability, channels=channels)
    gray = draws.chance(recipe.grayscale)
    blurred, sigma = draw_blur(draws, recipe.blur)
    blur = partial(gaussian_blur, kernel_size=recipe.blur_kernel or recipe.image_size // 20 * 2 + 1)
    statistics = channel_statistics(channels)
    view = torch.empty(len(images), channels, recipe.image_size, recipe.image_size, device=images.device)
    for rows in jitter.blocks(view):
        part = crop_resize(images[rows], boxes[rows], flips[rows], size=recipe.image_size)
        part = color_jitter(part, jitter.rows(rows))
        part = random_grayscale(part, gray[rows])
        part = on_chosen(blurred[rows], blur, part, sigma[rows])
        view[rows] = normalise(part, *statistics)
    return view


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
    everything = gather(queries)  # rank-major: 2 N rows of each process
    with torch.autocast(queries.device.type, enabled=False):  # which would multiply in bfloat16
        return cast(Tensor, _BlockedNTXent.apply(queries, everything, temperature))


class _BlockedNTXent(torch.autograd.Function):
    """NT-Xent of unit vectors, in blocks of queries: the matrix of all similarities is never in memory.

    The gradient of a block is formed in the forward pass, while its probabilities are at hand: the softmax of the
    similarities, less one at the partner.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, everything: Tensor, temperature: float) -> Tensor:
        count, total = len(queries), len(everything)
        first = rank() * count  # of this process's rows in everything
        own = torch.arange(count, device=queries.device)
        partner = (own + count // 2) % count + first
        loss = queries.new_zeros(())
        query_grad, other_grad = torch.empty_like(queries), torch.zeros_like(everything)
        for rows in own.split(max(1, BLOCK // total)):
            block = queries[rows] / temperature
            logits = block @ everything.mT
            positive = logits.gather(1, partner[rows, None])
            logits.scatter_(1, rows[:, None] + first, float("-inf"))  # nothing is contrasted with itself
            largest = logits.amax(dim=1, keepdim=True)
            weight = logits.sub_(largest).exp_()
            norm = weight.sum(dim=1, keepdim=True)
            loss += (norm.log() + largest - positive).sum()
            query_grad[rows] = (weight @ everything).div_(norm)
            other_grad.addmm_(weight.mT, block / norm)
        query_grad -= everything[partner]
        other_grad.index_add_(0, partner, queries, alpha=-1 / temperature)
        ctx.save_for_backward(query_grad.div_(count * temperature), other_grad.div_(count))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query_grad, other_grad = ctx.saved_tensors
        return grad * query_grad, grad * other_grad, None


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
