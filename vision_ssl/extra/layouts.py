"""How other programs name the tensors of the encoders and heads that this package has too, as data.

To read one more layout, add a row. A row's `anchor` is the name of one tensor, by which the layout is known wherever
it stands in a file: what precedes it (`state_dict.backbone.`) is the prefix of the whole encoder.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]


# What may stand beside an encoder under the same prefix without being part of it.
_OTHER_PARTS = (
    r"(?:\w+_)?(?:fc|heads?|classifier|linear|projector|predictor|pooler)\.|decoder[._]|(?:\w+_)?mask_token$|momentum_"
)

# What follows another network by a moving average, as its prefix tells.
_AVERAGED = re.compile(r"momentum|(?:^|[._])ema[._]|teacher|target|encoder_k\.")


@dataclass(frozen=True)
class Layout:
    """The names that a program gives to an encoder or a head.

    Attributes:
        label: Whose names they are, as users know it.
        anchor: The name of a tensor that only this layout has.
        rules: Patterns and their replacements, applied in order, that turn its names into ours.
        own: Pattern of the names, after the prefix, that belong to it.
        stem: Stem of a ResNet, where the layout implies it.
    """

    label: str
    anchor: str
    rules: Rules = ()
    own: str = f"(?!{_OTHER_PARTS})"
    stem: str | None = None

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """Where it is found, by what stands before its anchor; averaged copies only where there is nothing else."""
        found = [n.removesuffix(self.anchor) for n in names if n == self.anchor or n.endswith(f".{self.anchor}")]
        return [prefix for prefix in found if not _AVERAGED.search(prefix)] or found

    def find(self, tensors: dict[str, Tensor], prefix: str) -> "Found":
        """What belongs to it below a prefix."""
        names = [n for n in tensors if n.startswith(prefix) and re.match(self.own, n.removeprefix(prefix))]
        ours = {_rename(name.removeprefix(prefix), self.rules): tensors[name] for name in names}
        return Found(self, prefix, names, _fuse_attention(ours))


@dataclass(frozen=True)
class Found:
    """A layout found in a file.

    Attributes:
        layout: The layout.
        prefix: What stands before each of its names.
        names: The names in the file.
        tensors: The tensors by our names.
    """

    layout: Layout
    prefix: str
    names: list[str]
    tensors: dict[str, Tensor]


def _rename(name: str, rules: Rules) -> str:
    """Apply patterns and their replacements in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _fuse_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join separate query, key and value projections `attn.q`, `attn.k`, `attn.v` into timm's `attn.qkv`."""
    fused = dict(tensors)
    for query in [name for name in tensors if ".attn.q." in name]:
        names = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(name in fused for name in names):  # what lacks its partners stays, and is reported as unknown
            fused[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([fused.pop(name) for name in names])
    return fused


# The names inside a transformer block of transformers: before version 5, and since.
_TRANSFORMERS_BLOCK: Rules = (
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)

TIMM_VIT = Layout("timm's ViT", "patch_embed.proj.weight")

TRANSFORMERS = Layout(
    "transformers' ViT or ViTMAE",
    "embeddings.patch_embeddings.projection.weight",
    (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
        (r"^layernorm\.", "norm."),
        *_TRANSFORMERS_BLOCK,
    ),
)

# The children of a torchvision ResNet, numbered: conv1, bn1, relu, maxpool, layer1 to layer4, avgpool.
_NUMBERED: Rules = ((r"^0\.", "conv1."), (r"^1\.", "bn1."), *((rf"^{n + 3}\.", f"layer{n}.") for n in (1, 2, 3, 4)))
_NUMBERED_SMALL: Rules = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    *((rf"^{n + 1}\.", f"layer{n}.") for n in (1, 2, 3, 4)),
    (r"\.shortcut\.", ".downsample."),
)

# Where two rows fit, the first counts.
ENCODERS: tuple[Layout, ...] = (
    Layout("VISSL's ResNet", "_feature_blocks.layer1.0.conv1.weight", ((r"^_feature_blocks\.", ""),)),
    Layout(
        "a ResNet for small images as lightly's",
        "layer2.0.shortcut.0.weight",
        ((r"\.shortcut\.", ".downsample."),),
        stem="3x3-nopool",
    ),
    Layout("timm's or torchvision's ResNet", "layer1.0.conv1.weight"),
    Layout(
        "the children of lightly's ResNet for small images in nn.Sequential",
        "2.0.conv1.weight",
        _NUMBERED_SMALL,
        stem="3x3-nopool",
    ),
    Layout("the children of a torchvision ResNet in nn.Sequential", "7.0.conv1.weight", _NUMBERED),
    TIMM_VIT,
    Layout(
        "torchvision's ViT",
        "conv_proj.weight",
        (
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.ln\.", "norm."),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
        ),
    ),
    TRANSFORMERS,
)

PROJECTORS: tuple[Layout, ...] = (
    Layout("sthalles/SimCLR's", "fc.0.weight", ((r"^fc\.", ""),), own=r"fc\."),
    Layout("solo-learn's", "projector.0.weight", ((r"^projector\.", ""),), own=r"projector\."),
    Layout(
        "lightly's", "projection_head.layers.0.weight", ((r"^projection_head\.layers\.", ""),), own=r"projection_head\."
    ),
    Layout(
        "VISSL's",
        "heads.0.clf.0.weight",
        ((r"^heads\.0\.clf\.0\.", "0."), (r"^heads\.1\.clf\.0\.", "2.")),  # a ReLU, which has no tensors, is 1
        own=r"heads\.",
    ),
)

# MAE's own names, which transformers, lightly and solo-learn keep; `position` is compared and then dropped.
DECODER = Layout(
    "MAE's",
    "decoder_embed.weight",
    (
        (r"^decoder_embed\.", "embed."),
        (r"^decoder_pos_embed$", "position"),
        (r"^decoder_(?:blocks|layers|encoder\.layer)\.(\d+)\.", r"blocks.\1."),
        (r"^decoder_norm\.", "norm."),
        (r"^decoder_pred\.", "pixels."),
        *_TRANSFORMERS_BLOCK,
    ),
    own=r"decoder_|mask_token$",
)
