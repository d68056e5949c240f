"""Encoders: short names resolved to timm modules, small-image stems, and position embeddings.

The architectures are timm's. What is added here are ResNet stems for small images, registered with timm
under names of our own (`resnet18_3x3`), because timm cannot express them as arguments: the weights of such a
network would load into a plain `resnet18` without an error and give wrong features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, cast

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .errors import RecipeError

RESNETS = ("resnet18", "resnet34", "resnet50")
VITS = ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge")
ENCODERS = RESNETS + VITS
STEMS = ("7x7", "3x3", "3x3-nopool")
RESNET_POOLS = ("avg", "max", "")
VIT_POOLS = ("avg", "token")


@dataclass(frozen=True)
class EncoderSpec:
    """What timm needs to build an encoder: this is what `config.json` stores.

    Attributes:
        architecture: timm's name, or one of ours such as `resnet18_3x3`.
        image_size: Side of the square input, pixels.
        channels: Input channels.
        args: Further keyword arguments of `timm.create_model`.
    """

    architecture: str
    image_size: int
    channels: int = 3
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its short name, one of `ENCODERS`."""
        return next(name for name in ENCODERS if self.architecture.startswith(name))

    @property
    def is_vit(self) -> bool:
        """Whether this is a vision transformer (otherwise it is a ResNet)."""
        return self.architecture.startswith("vit_")

    @property
    def first_conv(self) -> str:
        """The layer that the image enters, which depends on the channels."""
        return "patch_embed.proj" if self.is_vit else "conv1"

    @property
    def classifier(self) -> str:
        """The layer that is there when there are classes."""
        return "head" if self.is_vit else "fc"

    @property
    def layout(self) -> str:
        """What the name leaves open: the patches of a ViT, the stem of a ResNet."""
        if self.is_vit:
            return f"patches of {self.args['patch_size']} px"
        return f"stem {self.architecture.partition('_')[2].replace('_', '-') or '7x7'}"

    def build(self, num_classes: int = 0, *, global_pool: str | None = None) -> nn.Module:
        """Build the encoder with random weights.

        Args:
            num_classes: Width of a classification head; 0 for pooled features.
            global_pool: How tokens or maps become features: `avg` or `token` for a ViT; `avg`, `max` or "" (none:
                the map itself, and no head) for a ResNet. By default, `avg`.

        Raises:
            RecipeError: The encoder has no such pooling.
        """
        pools = VIT_POOLS if self.is_vit else RESNET_POOLS[: 2 if num_classes else 3]
        if global_pool not in (None, *pools):
            expected = ", ".join(map(repr, pools))
            raise RecipeError(f"global_pool={global_pool!r} does not fit {self.architecture}: expected {expected}")
        pooling = {} if global_pool is None else {"global_pool": global_pool}
        args = self.args | pooling
        return timm.create_model(self.architecture, num_classes=num_classes, in_chans=self.channels, **args)


def resolve_encoder(
    name: str,
    *,
    image_size: int,
    stem: str = "auto",
    patch_size: int | None = None,
    channels: int = 3,
) -> EncoderSpec:
    """Resolve a short name to a full description of the network.

    Args:
        name: One of `ENCODERS`.
        image_size: Side of the square input, pixels.
        stem: For ResNets: `7x7` (stride 2 and max-pool, ImageNet's), `3x3` (stride 1 and max-pool),
            `3x3-nopool` (stride 1, no max-pool), or `auto`: `3x3-nopool` up to 40 px, `3x3` up to 96 px.
        patch_size: For ViTs, pixels; see `resolve_patch_size`.
        channels: Input channels.

    Raises:
        RecipeError: Unknown name or stem, or an image size that the patch size does not divide.
    """
    if name not in ENCODERS:
        close = get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RecipeError(f"encoder={name!r} is unknown: {hint}expected one of {', '.join(ENCODERS)}")
    if name in VITS:
        patch = resolve_patch_size(image_size, patch_size)
        # fc_norm=False keeps the final norm before pooling, so that tokens and pooled features carry the same
        # trained norm; timm's default for average pooling would look for a `fc_norm` that MAE never trains.
        args = {"img_size": image_size, "patch_size": patch, "global_pool": "avg", "fc_norm": False}
        return EncoderSpec(f"{name}_patch{14 if name == 'vit_huge' else 16}_224", image_size, channels, args)
    if stem == "auto":
        stem = "3x3-nopool" if image_size <= 40 else "3x3" if image_size <= 96 else "7x7"
    if stem not in STEMS:
        raise RecipeError(f"stem={stem!r} is unknown: expected auto, {', '.join(STEMS)}")
    return EncoderSpec(name if stem == "7x7" else _small_stem_name(name, stem), image_size, channels)


def resolve_patch_size(image_size: int, patch_size: int | None, *, argument: str = "image_size") -> int:
    """The side of a patch: `patch_size`, or by default 4 up to 40 px, 8 up to 112 px, otherwise 16.

    Raises:
        RecipeError: It does not divide the image size, which the error calls by the name of the `argument`.
    """
    patch = patch_size or (4 if image_size <= 40 else 8 if image_size <= 112 else 16)
    if image_size % patch:
        nearest = max(1, round(image_size / patch)) * patch
        raise RecipeError(
            f"{argument}={image_size} is not divisible by patch_size={patch}: the nearest valid is {nearest}"
        )
    return patch


def _small_stem_name(resnet: str, stem: str) -> str:
    return f"{resnet}_{stem.replace('-', '_')}"


class SmallStemResNet(ResNet):
    """timm's ResNet with a 3x3 stride-1 first convolution, with or without the max-pool after it."""

    def __init__(self, *args: Any, max_pool: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        old = cast(nn.Conv2d, self.conv1)
        conv = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = conv  # type: ignore[assignment]  # the type of timm's deep stem, which we do not build
        if not max_pool:
            self.maxpool = nn.Identity()  # type: ignore[assignment]  # as above


_LAYOUTS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
}


# Found by `register_model`: without weights of their own, what timm needs to load, adapt and preprocess.
default_cfgs = generate_default_cfgs(
    {
        _small_stem_name(resnet, stem): {
            "input_size": (3, side, side),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for resnet in RESNETS
        for stem, side in (("3x3", 64), ("3x3-nopool", 32))
    }
)


def _register_small_stem(resnet: str, stem: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> ResNet:
        layout = dict(_LAYOUTS[resnet], max_pool=stem == "3x3")
        return cast(ResNet, build_model_with_cfg(SmallStemResNet, name, pretrained, **layout, **kwargs))

    entrypoint.__name__ = name = _small_stem_name(resnet, stem)
    register_model(cast(Callable[..., Any], entrypoint))


for _resnet in RESNETS:
    for _stem in STEMS[1:]:
        _register_small_stem(_resnet, _stem)


def feature_dim(encoder: nn.Module) -> int:
    """Width D of the pooled features."""
    return cast(int, encoder.num_features)


def sincos_position_embedding(dim: int, grid: int, *, prefix_tokens: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, as MAE uses (He et al. 2022, appendix A.1).

    Half of the channels encode the row and half the column, each as sines then cosines of the position times
    frequencies that fall geometrically from 1 to 1/10000 (Vaswani et al. 2017, section 3.5).

    Args:
        dim: Channels, a multiple of 4.
        grid: Patches along a side.
        prefix_tokens: Tokens before the patches (the class token); their embedding is zero.

    Returns:
        float32 (1, prefix_tokens + grid * grid, dim).
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2): one coordinate
    rows = line[:, None].expand(grid, grid, -1)
    columns = line[None].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=2).reshape(grid * grid, dim)
    return torch.cat([torch.zeros(prefix_tokens, dim), patches.float()])[None]


def fix_position_embedding(encoder: VisionTransformer) -> None:
    """Replace a ViT's learned position embedding by the fixed sine-cosine one, which is not trained."""
    table = cast(nn.Parameter, encoder.pos_embed)
    grid = encoder.patch_embed.grid_size[0]
    with torch.no_grad():
        table.copy_(sincos_position_embedding(table.shape[-1], grid, prefix_tokens=encoder.num_prefix_tokens))
    table.requires_grad_(False)


def resize_input(encoder: nn.Module, image_size: int) -> None:
    """Change the image size that an encoder takes; a ViT's position embedding is interpolated (bicubic).

    Raises:
        RecipeError: The patch size does not divide it.
    """
    if isinstance(encoder, VisionTransformer):
        resolve_patch_size(image_size, encoder.patch_embed.patch_size[0], argument="img_size")
        encoder.set_input_size((image_size, image_size))
