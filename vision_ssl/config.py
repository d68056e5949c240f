"""`config.json`: which encoder some weights are of, and their card, in the form that timm reads."""

import json
import re
from pathlib import Path
from typing import Any

from .data import channel_statistics
from .encoders import ENCODERS, STEMS, EncoderSpec, resolve_encoder
from .errors import RecipeError, WeightsError

CONFIG_FILE = "config.json"

# What a config may ask for at most, far above what anyone trains with: a hostile one shall not fill the memory.
_MOST_BYTES = 1 << 20  # of the file
_MOST_PIXELS = 1 << 14  # along a side
_MOST_UNITS = 1 << 17  # numbers in a patch (of a ResNet: in its first filter), and patches in an image, together

# All that a config may ask for: timm would build anything, and some of it opens further files.
_ARCHITECTURES = {
    resolve_encoder(name, image_size=224, stem=stem).architecture: (name, stem) for name in ENCODERS for stem in STEMS
}


def to_config(spec: EncoderSpec, num_features: int, card: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` holds: the arguments and the preprocessing for timm, and our card."""
    mean, std = channel_statistics(spec.channels)
    return {
        "architecture": spec.architecture,
        "num_classes": 0,
        "num_features": num_features,
        "model_args": _model_args(spec),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [spec.channels, spec.image_size, spec.image_size],
            "fixed_input_size": spec.is_vit,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "first_conv": spec.first_conv,
            "classifier": spec.classifier,
        },
        "vision_ssl": card,
    }


def _model_args(spec: EncoderSpec) -> dict[str, Any]:
    return spec.args | ({} if spec.channels == 3 else {"in_chans": spec.channels})


def read_config(path: Path) -> tuple[EncoderSpec, dict[str, Any]]:
    """The encoder and the card that a config describes, if this package could have written it.

    Of timm's own configs, which have no `model_args`, those of the encoders that we know are taken too.

    Raises:
        WeightsError: The file is no config, or asks for anything else.
    """
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_MOST_BYTES).decode("utf-8"))
        architecture = config["architecture"]
        args = dict(config["model_args"]) if "model_args" in config else None
        channels, size, _ = config["pretrained_cfg"]["input_size"]
        statistics = tuple(tuple(config["pretrained_cfg"][name]) for name in ("mean", "std"))
        card = dict(config.get("vision_ssl", {}))
        if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in card.get("sha256", {}).values()):
            raise ValueError("sha256 holds what is no SHA-256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise WeightsError(f"{path} is not the description of an encoder: {reason}") from error
    if str(architecture) not in _ARCHITECTURES:
        raise WeightsError(f"{path} asks for {_short(architecture)}: expected one of {', '.join(_ARCHITECTURES)}")
    name, stem = _ARCHITECTURES[architecture]
    patch_size = _named_patch_size(architecture) if args is None else args.get("patch_size")
    numbers = {"channels": channels, "image size": size, "patch_size": 1 if patch_size is None else patch_size}
    for key, number in numbers.items():
        if type(number) is not int or number < 1:
            raise WeightsError(f"{path} has {key} {_short(number)}: expected a whole number above 0")
    units = channels * (patch_size or 7) ** 2 + (size // patch_size if patch_size else 0) ** 2
    if size > _MOST_PIXELS or units > _MOST_UNITS:
        raise WeightsError(
            f"{path} asks for {_short(channels)} channels of {_short(size)} px, in patches of {_short(patch_size)}: "
            f"expected at most {_MOST_PIXELS:,} px, and {_MOST_UNITS:,} numbers in a patch and patches together"
        )
    try:
        spec = resolve_encoder(name, image_size=size, stem=stem, patch_size=patch_size, channels=channels)
    except RecipeError as error:
        raise WeightsError(f"{path}: {error}") from error
    if args not in (None, _model_args(spec)):
        raise WeightsError(f"{path} has model_args {_short(args)}: expected {_model_args(spec)}")
    if statistics != channel_statistics(channels):
        expected = _short(channel_statistics(channels))
        raise WeightsError(f"{path} has mean and std {_short(statistics)}: expected {expected}")
    return spec, card


def _short(value: Any) -> str:
    """A value as an error shows it: not all of what a hostile file may hold."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _named_patch_size(architecture: str) -> int | None:
    """The patch size in timm's name of a ViT, such as 14 in `vit_huge_patch14_224`; None for a ResNet."""
    _, _, rest = architecture.partition("_patch")
    return int(rest.partition("_")[0]) if rest else None
