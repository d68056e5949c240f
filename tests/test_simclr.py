import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssl.recipes import SimCLR
from vision_ssl.simclr import SimCLRModel, nt_xent
from vision_ssl.spread import alignment, feature_std, uniformity

CPU = torch.device("cpu")


def projections(count: int, dim: int = 8, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    first, second = (scale * torch.randn(count, dim, generator=generator) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_()


def loop(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 1 of the paper, term by term, in float64."""
    z = torch.cat([first, second]).double()
    count = len(first)
    losses = []
    for i in range(2 * count):
        similarity = [F.cosine_similarity(z[i], z[k], dim=0) / temperature for k in range(2 * count)]
        others = torch.stack([similarity[k] for k in range(2 * count) if k != i])
        losses.append(torch.logsumexp(others, dim=0) - similarity[(i + count) % (2 * count)])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_loss_and_gradient_equal_a_loop(count: int, temperature: float) -> None:
    first, second = projections(count)
    ours, theirs = nt_xent(first, second, temperature), loop(first, second, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for own, their in zip(
        torch.autograd.grad(ours, (first, second)), torch.autograd.grad(theirs, (first, second)), strict=True
    ):
        torch.testing.assert_close(own, their, rtol=1e-4, atol=1e-6)


def plain(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The loss from the whole matrix of similarities."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    count = len(z)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(count, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, (torch.arange(count) + count // 2) % count)


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_blocks_equal_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, block: int, temperature: float) -> None:
    monkeypatch.setattr("vision_ssl.simclr.CPU_BLOCK", block)
    first, second = projections(37, dim=32)
    ours, theirs = nt_xent(first, second, temperature), plain(first, second, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for own, their in zip(
        torch.autograd.grad(3 * ours, (first, second)), torch.autograd.grad(3 * theirs, (first, second)), strict=True
    ):
        torch.testing.assert_close(own, their, rtol=0, atol=1e-6)


def test_loss_by_hand() -> None:
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).split(1)
    views = torch.cat([one, other])
    # Each view sees its equal at similarity 1, and two others at 0.
    expected = math.log(math.e**2 + 2) - 2
    assert nt_xent(views, views, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_loss_is_symmetric_in_the_views() -> None:
    first, second = projections(5)
    assert nt_xent(first, second, 0.2).item() == pytest.approx(nt_xent(second, first, 0.2).item(), rel=1e-6)


def test_loss_does_not_depend_on_scale_or_on_the_order_of_the_images() -> None:
    first, second = projections(5)
    expected = pytest.approx(nt_xent(first, second, 0.2).item(), rel=1e-5)
    assert nt_xent(1e4 * first, 1e-3 * second, 0.2).item() == expected
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    assert nt_xent(first[shuffled], second[shuffled], 0.2).item() == expected
    assert nt_xent(first[shuffled], second, 0.2).item() != expected


def test_loss_stays_float32_under_autocast() -> None:
    first, second = projections(32, dim=128)
    expected = nt_xent(first, second, 0.07)
    gradients = torch.autograd.grad(expected, (first, second))
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(first, second, 0.07)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for own, their in zip(torch.autograd.grad(loss, (first, second)), gradients, strict=True):
        assert torch.equal(own, their)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_projections_in_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    first, second = (view.detach().to(dtype).requires_grad_() for view in projections(4, scale=1e4))
    loss = nt_xent(first, second, temperature=0.01)  # exp(1 / 0.01) overflows even float32
    assert loss.item() == pytest.approx(loop(first, second, 0.01).item(), rel=1e-4)
    for gradient in torch.autograd.grad(loss, (first, second)):
        assert gradient.isfinite().all()


def test_random_projections_lose_the_logarithm_of_the_choice() -> None:
    first, second = projections(200, dim=500)
    assert nt_xent(first, second, 1.0).item() == pytest.approx(math.log(399), rel=0.01)


# Model


class Mean(nn.Module):
    """An encoder without BatchNorm."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 12)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return torch.tanh(self.project(images.mean(dim=(2, 3))))


def test_model_is_the_loss_of_the_projected_features() -> None:
    torch.manual_seed(0)
    model = SimCLRModel(Mean(), hidden=10, dim=6, norm=False, temperature=0.3)
    first, second = torch.randn(2, 4, 3, 8, 8)
    loss, metrics = model(first, second)
    torch.testing.assert_close(loss, nt_xent(model.head(model.encoder(first)), model.head(model.encoder(second)), 0.3))
    assert model.encoder.batches == [8, 4, 4]  # one pass for both views

    features = model.encoder(torch.cat([first, second]))
    ours, theirs = model.head(features).split(4)
    expected = {
        "feature_std": feature_std(features),
        "alignment": alignment(ours, theirs),
        "uniformity": uniformity(ours),
    }
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)
        assert not value.requires_grad


@pytest.mark.parametrize(
    ("norm", "layers"), [(False, "Linear ReLU Linear"), (True, "Linear BatchNorm1d ReLU Linear BatchNorm1d")]
)
def test_projector_layers(norm: bool, layers: str) -> None:
    model = SimCLRModel(Mean(), hidden=10, dim=6, norm=norm, temperature=0.3)
    assert " ".join(type(layer).__name__ for layer in model.head) == layers
    linear = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(12, 10), (10, 6)]
    assert all((layer.bias is None) == norm for layer in linear)  # BatchNorm has a bias of its own


def test_recipe_resolves_the_projector() -> None:
    with torch.device("meta"):
        model: Any = SimCLR(encoder="resnet50", batch_size=2, projector_norm=False, temperature=0.4).build()
        narrow: Any = SimCLR(projector_hidden=64, projector_dim=32, batch_size=2).build()
    assert [(layer.in_features, layer.out_features) for layer in model.head[::2]] == [(2048, 2048), (2048, 128)]
    assert model.temperature == 0.4
    assert narrow.head[0].out_features == 64
    assert narrow.head[-1].num_features == 32


def test_training_pulls_the_views_together() -> None:
    torch.manual_seed(0)
    model = SimCLRModel(Mean(), hidden=16, dim=8, norm=True, temperature=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    colours = torch.randn(8, 3, 1, 1).expand(-1, -1, 32, 32)
    views = [colours + 0.3 * torch.randn(8, 3, 1, 1) for _ in range(2)]
    losses = []
    for _ in range(100):
        loss, _ = model(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.9
