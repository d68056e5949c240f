"""What encoder a set of tensors is, from their shapes."""

import math

import torch
from torch import Tensor

from ..encoders import RESNETS, VITS, EncoderSpec, resolve_encoder
from ..errors import WeightsError

# Bottleneck blocks or basic ones, and how many in each of the four layers.
_BLOCKS = dict(zip(RESNETS, [(False, (2, 2, 2, 2)), (False, (3, 4, 6, 3)), (True, (3, 4, 6, 3))], strict=True))
_SIZES = dict(zip(VITS, [(192, 12), (384, 12), (768, 12), (1024, 24), (1280, 32)], strict=True))  # width and blocks

# What a ResNet's weights do not tell, unless it is said.
_IMAGE_SIZES = {"7x7": 224, "3x3": 64, "3x3-nopool": 32}


def infer_resnet(tensors: dict[str, Tensor], *, stem: str | None, image_size: int | None) -> EncoderSpec:
    """The ResNet whose tensors these are, by timm's names.

    Args:
        tensors: By timm's names.
        stem: Its stem. By default `7x7` where the first convolution has that size. After a 3x3 one, weights do not
            tell whether there is a max-pool: by default there is none (`3x3-nopool`), and above 40 px one (`3x3`).
        image_size: Side of the input, pixels; by default 224, 64 and 32 for the three stems.

    Raises:
        WeightsError: No ResNet of ours has such shapes, or not with this stem.
    """
    conv = _tensor(tensors, "conv1.weight", 4)
    blocks = (
        "layer1.0.conv3.weight" in tensors,
        tuple(sum(_is_block(name, layer) for name in tensors) for layer in range(1, 5)),
    )
    name = next((name for name, known in _BLOCKS.items() if known == blocks), None)
    if name is None:
        kind, counts = "bottleneck" if blocks[0] else "basic", "-".join(map(str, blocks[1]))
        raise WeightsError(f"a ResNet of {counts} {kind} blocks is none of ours: expected {', '.join(RESNETS)}")
    if conv.shape[2:] == (7, 7):
        fitting = ["7x7"]
    elif conv.shape[2:] == (3, 3):
        fitting = ["3x3", "3x3-nopool"] if image_size and image_size > 40 else ["3x3-nopool", "3x3"]
    else:
        raise WeightsError(f"'conv1.weight' is {tuple(conv.shape)}: expected a kernel of 7 x 7 or 3 x 3")
    stem = stem or fitting[0]
    if stem not in fitting:
        raise WeightsError(f"stem={stem!r} does not fit 'conv1.weight' of {tuple(conv.shape)}: expected {fitting[0]}")
    return resolve_encoder(name, image_size=image_size or _IMAGE_SIZES[stem], stem=stem, channels=conv.shape[1])


def _is_block(name: str, layer: int) -> bool:
    return name.startswith(f"layer{layer}.") and name.endswith(".conv1.weight")


def infer_vit(tensors: dict[str, Tensor]) -> EncoderSpec:
    """The vision transformer whose tensors these are, by timm's names; see `with_class_position`.

    Raises:
        WeightsError: No ViT of ours has such shapes.
    """
    width, channels, patch_size, other = _tensor(tensors, "patch_embed.proj.weight", 4).shape
    depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in tensors)
    name = next((name for name, size in _SIZES.items() if size == (width, depth)), None)
    if name is None:
        known = ", ".join(f"{name} of {wide} and {deep}" for name, (wide, deep) in _SIZES.items())
        raise WeightsError(f"a ViT {width} wide with {depth} blocks is none of ours: expected {known}")
    _tensor(tensors, "cls_token", 3)  # without one, its patches would attend to one token less than ours
    patches = _tensor(tensors, "pos_embed", 3).shape[1] - 1
    grid = math.isqrt(patches)
    if patch_size != other or grid**2 != patches:
        raise WeightsError(f"a ViT of {patches} patches of {patch_size} x {other} px: expected squares, in a square")
    return resolve_encoder(name, image_size=grid * patch_size, patch_size=patch_size, channels=channels)


def with_class_position(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the class token of a ViT a position embedding of zero where it has none, which computes the same."""
    position = tensors.get("pos_embed")
    if position is None or position.ndim != 3 or math.isqrt(position.shape[1]) ** 2 != position.shape[1]:
        return tensors
    return tensors | {"pos_embed": torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)}


def _tensor(tensors: dict[str, Tensor], name: str, dimensions: int) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != dimensions or 0 in tensor.shape:
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise WeightsError(f"{name!r} is {found}: expected a tensor of {dimensions} dimensions")
    return tensor
