"""SimCLR (Chen et al. 2020): a projector, and the NT-Xent loss between two views."""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .distributed import gather, rank, world_size
from .encoders import feature_dim
from .spread import alignment, feature_std, uniformity

if TYPE_CHECKING:
    from .recipes import SimCLR

# Similarities that are computed at a time. A CPU's stay in its cache (4 MB); a GPU wants few, large products (256 MB).
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 26


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
    everything = gather(queries) if world_size() > 1 else None  # rank-major: 2 N rows of each process
    with torch.autocast(queries.device.type, enabled=False):  # which would multiply in bfloat16
        return cast(Tensor, _BlockedNTXent.apply(queries, everything, temperature))


class _BlockedNTXent(torch.autograd.Function):
    """NT-Xent of unit vectors, in blocks of queries: the matrix of all similarities is never in memory.

    The gradient of a block is formed in the forward pass, while its probabilities are at hand: the softmax of the
    similarities, less one at the partner.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, gathered: Tensor | None, temperature: float) -> Tensor:
        everything = queries if gathered is None else gathered
        count, total = len(queries), len(everything)
        first = rank() * count  # of this process's rows in everything
        own = torch.arange(count, device=queries.device)
        partner = (own + count // 2) % count + first
        loss = queries.new_zeros(())
        query_grad, other_grad = torch.empty_like(queries), torch.zeros_like(everything)
        block = CPU_BLOCK if queries.device.type == "cpu" else GPU_BLOCK
        for rows in own.split(max(1, block // total)):
            scaled = queries[rows] / temperature
            logits = scaled @ everything.mT
            positive = logits.gather(1, partner[rows, None])
            logits.scatter_(1, rows[:, None] + first, float("-inf"))  # nothing is contrasted with itself
            largest = logits.amax(dim=1, keepdim=True)
            weight = logits.sub_(largest).exp_()
            norm = weight.sum(dim=1, keepdim=True)
            loss += (norm.log() + largest - positive).sum()
            query_grad[rows] = (weight @ everything).div_(norm)
            other_grad.addmm_(weight.mT, scaled / norm)
        query_grad -= everything[partner]
        other_grad.index_add_(0, partner, queries, alpha=-1 / temperature)
        query_grad.div_(count * temperature)
        other_grad.div_(count)
        ctx.save_for_backward(*([query_grad.add_(other_grad)] if gathered is None else [query_grad, other_grad]))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        query_grad, *other_grad = ctx.saved_tensors
        return grad * query_grad, grad * other_grad[0] if other_grad else None, None


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
        ours, theirs = projections[: len(first)], projections[len(first) :]
        with torch.no_grad():
            metrics = {
                "feature_std": feature_std(features),
                "alignment": alignment(ours, theirs),
                "uniformity": uniformity(ours),
            }
        return nt_xent(ours, theirs, self.temperature), metrics


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
