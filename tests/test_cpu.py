import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssl.cpu import SmallMapConv2d, use_fast_kernels
from vision_ssl.encoders import resolve_encoder


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (1, 4), (3, 2), (5, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_of_small_maps_equals_torchs(
    height: int, width: int, stride: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = SmallMapConv2d(7, 5, 3, stride=stride, padding=1, bias=False)
    conv.to(memory_format=memory_format)
    images = torch.randn(2, 7, height, width).to(memory_format=memory_format).requires_grad_()
    ours, theirs = conv(images), F.conv2d(images, conv.weight, stride=stride, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for own, their in zip(gradients(ours, images, conv.weight), gradients(theirs, images, conv.weight), strict=True):
        torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-6)


def test_convolution_under_autocast() -> None:
    torch.manual_seed(0)
    conv, images = SmallMapConv2d(16, 4, 3, padding=1, bias=False), torch.randn(2, 16, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = conv(images)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), F.conv2d(images, conv.weight, padding=1), rtol=0.02, atol=0.02)


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that came to torch's own kernel."""
    shapes: list[tuple[int, ...]] = []
    forward = nn.Conv2d.forward

    def counted(self: nn.Conv2d, input: Tensor) -> Tensor:
        shapes.append(tuple(input.shape))
        return forward(self, input)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    return shapes


@pytest.mark.parametrize(
    ("make", "side", "direct"),
    [
        (lambda: SmallMapConv2d(4, 4, 3, padding=1, bias=False), 2, 0),
        (lambda: SmallMapConv2d(4, 4, 3, padding=1, bias=False), 3, 1),
        (lambda: SmallMapConv2d(4, 4, 3, padding=1, stride=2, bias=False), 4, 0),
        (lambda: SmallMapConv2d(4, 4, 3, padding=1, stride=2, bias=False), 5, 1),
        (lambda: SmallMapConv2d(4, 4, 3, padding=1), 2, 1),
        (lambda: SmallMapConv2d(4, 4, 3, padding=1, groups=2, bias=False), 2, 1),
    ],
)
def test_small_maps_alone_take_the_matrix_product(
    make: Callable[[], nn.Conv2d], side: int, direct: int, direct_calls: list[tuple[int, ...]]
) -> None:
    conv, images = make(), torch.randn(1, 4, side, side)
    output = conv(images)
    assert len(direct_calls) == direct
    expected = F.conv2d(images, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "7x7"), ("resnet18", "3x3"), ("vit_tiny", "auto")])
def test_fast_model_equals_the_slow_one(name: str, stem: str) -> None:
    torch.manual_seed(0)
    slow = resolve_encoder(name, image_size=32, stem=stem).build()
    fast = copy.deepcopy(slow)
    parameters = list(fast.parameters())
    use_fast_kernels(fast, bf16=True)
    assert all(before is after for before, after in zip(parameters, fast.parameters(), strict=True))
    assert list(fast.state_dict()) == list(slow.state_dict())

    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    outputs = slow(images), fast(images)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    ours, theirs = (gradients(output, images)[0] for output in outputs)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    for key, value in slow.state_dict().items():  # running statistics too
        torch.testing.assert_close(fast.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_resnet_uses_the_matrix_product_where_its_maps_are_small(direct_calls: list[tuple[int, ...]]) -> None:
    encoder = resolve_encoder("resnet18", image_size=64, stem="7x7").build().eval()
    use_fast_kernels(encoder, bf16=True)
    encoder(torch.randn(1, 3, 64, 64))
    assert len(direct_calls) == 20 - 4  # all but the four 3x3 convolutions of the last stage, on 2 px maps


def test_explicit_attention_is_a_matter_of_this_model_alone() -> None:
    ours: Any = resolve_encoder("vit_tiny", image_size=32).build()
    use_fast_kernels(ours, bf16=True)
    other: Any = resolve_encoder("vit_tiny", image_size=32).build()
    assert not any(block.attn.fused_attn for block in ours.blocks)
    assert all(block.attn.fused_attn for block in other.blocks)


def test_attention_stays_fused_in_float32() -> None:
    encoder: Any = resolve_encoder("vit_tiny", image_size=32).build()
    use_fast_kernels(encoder, bf16=False)
    assert all(block.attn.fused_attn for block in encoder.blocks)


def test_other_convolutions_stay_as_they_are() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 3, 3),
        nn.Conv2d(3, 3, 3, padding=1, dilation=2),
        nn.Conv2d(3, 3, (3, 1), padding=1),
        nn.ConvTranspose2d(3, 3, 3, padding=1),
    )
    kinds = [type(module) for module in model]
    use_fast_kernels(model, bf16=True)
    assert [type(module) for module in model] == kinds
    assert SmallMapConv2d not in kinds
