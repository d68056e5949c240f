"""Turn checkpoints of other programs into this package's form of weights, and say what was recognised."""

import argparse
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .. import hub
from ..cache import first_few
from ..data import channel_statistics
from ..encoders import STEMS, EncoderSpec, sincos_position_embedding
from ..errors import RecipeError, WeightsError
from ..locate import file_hash
from ..storage import check_new_folder
from .heads import MAY_LACK, Head, find_decoder, find_projector, same_table, swap_halves
from .infer import infer_resnet, infer_vit, with_class_position
from .layouts import ENCODERS, TIMM_VIT, TRANSFORMERS, Found
from .pickles import flatten, read_checkpoint

UNKNOWN_LICENCE = "unknown: see its source"
MAE_LICENCE = "CC-BY-NC-4.0 where facebookresearch/mae published these weights; otherwise " + UNKNOWN_LICENCE


@dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint.

    Attributes:
        directory: Where the weights are.
        recognised: Whose names the encoder's tensors have, and below which prefix.
        encoder: The encoder, its patches or stem, and its image size.
        head: What `head.safetensors` holds; empty where there is none.
        left_out: Parts of the file that are not in the weights, and of how many tensors each.
        notes: What the file does not tell, or what differs from the original.
        licence: Of the weights, as far as the file tells.
    """

    directory: Path
    recognised: str
    encoder: str
    head: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    licence: str

    def __str__(self) -> str:
        """A line for each fact."""
        lines = [
            ("recognised", self.recognised),
            ("encoder", self.encoder),
            ("head", self.head or "none"),
            ("left out", ", ".join(self.left_out) or "nothing"),
            *(("note", note) for note in self.notes),
            ("licence", self.licence),
            ("out", str(self.directory)),
        ]
        return "\n".join(f"{name:>10}  {value}" for name, value in lines)


def convert(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    stem: str | None = None,
    image_size: int | None = None,
) -> Conversion:
    """Convert a checkpoint of facebookresearch/mae, timm, torchvision, transformers, lightly, solo-learn and others.

    Nothing in the file runs. The weights load with `vision_ssl.load(out)`: as everywhere in this package, a ViT's
    pooled features are the mean of its normed patch tokens, whatever the original pools.

    Args:
        file: The checkpoint: `.pth`, `.pt`, `.ckpt`, `.bin`, `.pth.tar` or `.safetensors`.
        out: Folder for the weights; new, or empty.
        stem: ResNets: `7x7`, `3x3` or `3x3-nopool`; see `infer_resnet` for the default.
        image_size: ResNets: side of the input, pixels; see `infer_resnet` for the default.

    Raises:
        WeightsError: The file is damaged, holds pickled code, or an encoder that is none of ours.
        RecipeError: `stem` or `image_size` cannot be.
        CheckpointError: `out` holds something, or the disk refuses.
    """
    path, directory = Path(file), Path(out)
    if stem is not None and stem not in STEMS:
        raise RecipeError(f"stem={stem!r} is unknown: expected {', '.join(STEMS)}")
    if image_size is not None and image_size < 1:
        raise RecipeError(f"image_size={image_size} is too small: expected at least 1")
    check_new_folder(directory)
    checkpoint = read_checkpoint(path)
    settings = _settings(checkpoint, path.parent / "config.json")
    try:
        tensors = flatten(checkpoint)
        found = _find_encoder(tensors)
        spec, encoder = _build(found, stem, image_size)
        if found.layout is TRANSFORMERS:
            _check_settings(settings, encoder)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    # A ViT's projector, if there is one, was trained on pooled features other than ours.
    head = find_decoder(tensors, encoder, spec, settings) if spec.is_vit else find_projector(tensors, encoder)
    is_mae = _is_mae(found, head)
    conversion = Conversion(
        directory,
        recognised=("facebookresearch/mae" if is_mae else found.layout.label)
        + (f", below {found.prefix!r}" if found.prefix else ""),
        encoder=f"{spec.name}, {spec.layout}, at {spec.image_size} px",
        head=head.description if head else "",
        left_out=_left_out(tensors, found, head),
        notes=(
            *_encoder_notes(found, spec, tensors, settings),
            *_input_notes(found, spec, settings, stem=stem, image_size=image_size),
            *([head.note] if head and head.note else []),
        ),
        licence=MAE_LICENCE if is_mae else UNKNOWN_LICENCE,
    )
    card = {
        **(head.facts if head else {}),
        "source": {"file": path.name, "sha256": file_hash(path), "recognised": conversion.recognised},
        "left_out": list(conversion.left_out),
        "notes": list(conversion.notes),
        "licence": conversion.licence,
        "scores": [],
    }
    hub.save(directory, encoder, spec, card=card, head=head.module if head else None)
    return conversion


def _find_encoder(tensors: dict[str, Tensor]) -> Found:
    for layout in ENCODERS:
        prefixes = layout.prefixes(tensors)
        if len(prefixes) > 1:
            places = first_few([repr(prefix) for prefix in prefixes])
            raise WeightsError(f"it holds several encoders, below {places}: expected a file with one")
        if prefixes:
            return layout.find(tensors, prefixes[0])
    known = ", ".join(layout.label for layout in ENCODERS)
    raise WeightsError(f"no encoder was recognised among {first_few(list(tensors))}: expected {known}")


def _build(found: Found, stem: str | None, image_size: int | None) -> tuple[EncoderSpec, nn.Module]:
    tensors = found.tensors
    if "patch_embed.proj.weight" in tensors:
        tensors = with_class_position(tensors)
        spec = infer_vit(tensors)
        if image_size not in (None, spec.image_size):
            raise RecipeError(
                f"image_size={image_size} is not the {spec.image_size} px of the position embedding: convert the file "
                "as it is, and give the size to `load`"
            )
    else:
        spec = infer_resnet(tensors, stem=stem or found.layout.stem, image_size=image_size)
    encoder = spec.build()
    if wrong := hub.misfits(tensors, encoder, may_lack=MAY_LACK):
        raise WeightsError(f"this is no {spec.name} of ours: {first_few(wrong)}")
    encoder.load_state_dict(tensors, strict=False)
    return spec, encoder


def _settings(checkpoint: dict[str, Any], config: Path) -> dict[str, Any]:
    """What a file says beside its tensors: the options that trained it, and a `config.json` that lies beside it."""
    options = checkpoint.get("args")
    settings = dict(vars(options)) if isinstance(options, argparse.Namespace) else {}
    with suppress(OSError, ValueError, TypeError, RecursionError):  # there is none, or it is about something else
        settings |= json.loads(config.read_text(encoding="utf-8"))
    return settings


def _check_settings(settings: dict[str, Any], encoder: nn.Module) -> None:
    """Refuse a transformers model that has our shapes and computes something else."""
    expected = {"num_attention_heads": cast(Any, encoder).blocks[0].attn.num_heads, "hidden_act": "gelu"}
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise WeightsError(f"its config.json has {name} {settings[name]!r}: expected {value!r}")


def _is_mae(found: Found, head: Head | None) -> bool:
    """Whether a file is laid out as facebookresearch/mae's: with its decoder, or in its container `model`.

    Its fixed position embedding tells the latter from others that use the container.
    """
    position = found.tensors.get("pos_embed")
    if found.layout is not TIMM_VIT or position is None:
        return False
    if head is not None:
        return head.found.prefix == found.prefix
    fixed = sincos_position_embedding(position.shape[2], math.isqrt(position.shape[1]), prefix_tokens=1)
    return found.prefix == "model." and same_table(position, swap_halves(fixed, -1))


def _left_out(tensors: dict[str, Tensor], found: Found, head: Head | None) -> tuple[str, ...]:
    """Parts of the file that are not used: their names up to where they depart from the encoder's prefix."""
    used = {*found.names, *(head.found.names if head else ())}
    inside = found.prefix.split(".")
    parts: Counter[str] = Counter()
    for name in tensors.keys() - used:
        words = name.split(".")
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, inside, strict=False)))
        parts[".".join(words[: shared + 1])] += 1
    return tuple(f"{part} ({count} tensor{'s' * (count > 1)})" for part, count in sorted(parts.items()))


def _encoder_notes(found: Found, spec: EncoderSpec, names: Iterable[str], settings: dict[str, Any]) -> Iterator[str]:
    """Where the encoder differs from the original."""
    if spec.is_vit:
        yield "pooled features are the mean of the normed patch tokens, whatever the original pools"
    epsilon = settings.get("layer_norm_eps", 1e-12)
    if found.layout is TRANSFORMERS and epsilon != 1e-6:
        yield f"LayerNorm adds 1e-06 to the variance here, and {epsilon} in the original"
    if spec.layout.startswith("stem 3x3") and any(re.search(r"(^|\.)projector\.", name) for name in names):
        yield "solo-learn pads its 3x3 stem by 2 pixels, where this one pads by 1: features differ near the border"


def _input_notes(
    found: Found, spec: EncoderSpec, settings: dict[str, Any], *, stem: str | None, image_size: int | None
) -> Iterator[str]:
    """What is assumed about the images, since the weights do not tell it."""
    if not spec.is_vit:
        if image_size is None:
            yield f"the image size is not in the weights: assumed {spec.image_size} px (--image-size)"
        if stem is None and found.layout.stem is None and spec.layout != "stem 7x7":
            yield f"whether a max-pool follows the 3x3 stem is not in the weights: assumed {spec.layout} (--stem)"
    ours = [list(values) for values in channel_statistics(spec.channels)]
    config = settings.get("pretrained_cfg")
    theirs = [config.get(name) for name in ("mean", "std")] if isinstance(config, dict) else ours
    if theirs != ours:
        yield f"`preprocess` normalises by mean and std {ours}, but the original by {theirs}"
