"""What makes the same arithmetic faster on CPUs: other kernels for attention and for very small maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_fast_kernels(model: nn.Module, *, bf16: bool) -> None:
    """Switch a model's attention and 3x3 convolutions, in place, to what CPUs compute fastest in training.

    Args:
        model: Any module.
        bf16: Whether the training will compute in bfloat16. The fused attention's backward takes half of such a step;
            in float32 it is the faster one.
    """
    for module in model.modules():
        if bf16 and hasattr(module, "fused_attn"):
            # On these modules alone: timm's `set_fused_attn` would change every model of the process.
            module.fused_attn = False  # type: ignore[assignment]  # nn.Module types attributes as modules
        if type(module) is nn.Conv2d and _is_padded_3x3(module):
            # A new class alone keeps the parameters, their names and the optimiser's view of them.
            module.__class__ = SmallMapConv2d


def _is_padded_3x3(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1))


class SmallMapConv2d(nn.Conv2d):
    """A padded 3x3 convolution that becomes one matrix product when its output is at most 2 px wide.

    The direct kernel works along rows of pixels: on such maps, which end a ResNet at 64 px, it runs at a
    tenth of its usual speed.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        stride = int(self.stride[0])
        height, width = ((side - 1) // stride + 1 for side in input.shape[2:])
        if max(height, width) > 2 or self.groups > 1 or self.bias is not None:
            return super().forward(input)
        padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        taps = [
            padded[:, y : y + stride * (height - 1) + 1 : stride, x : x + stride * (width - 1) + 1 : stride]
            for y in range(3)
            for x in range(3)
        ]
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (9 C, C_out), ordered as the taps
        return (torch.cat(taps, dim=3) @ weight).permute(0, 3, 1, 2)
