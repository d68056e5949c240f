"""Weights in and out: packaged ones by name, a folder, or a file, in timm's own form."""

import hashlib
import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .cache import first_few
from .data import Preprocess, channel_statistics
from .encoders import ENCODERS, STEMS, EncoderSpec, feature_dim, resize_input, resolve_encoder
from .errors import CheckpointError, RecipeError, WeightsError
from .registry import find, list_models
from .storage import load_tensors, save_json, save_tensors

ENCODER_FILE, HEAD_FILE, CONFIG_FILE = "model.safetensors", "head.safetensors", "config.json"

# All that a config may ask for: timm would build anything, and some of it opens further files.
_ARCHITECTURES = {
    resolve_encoder(name, image_size=224, stem=stem).architecture: (name, stem) for name in ENCODERS for stem in STEMS
}


class Encoder(nn.Module):
    """What `load` returns, as type checkers see it: a timm module with two plain attributes.

    Attributes:
        preprocess: Turns a Pillow image into the encoder's input.
        card: What it was trained on, how, and its measured scores.
        num_features: Width D of the pooled features.
    """

    preprocess: Preprocess
    card: dict[str, Any]
    num_features: int

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, D) of a ViT, or the map (B, D, h, w) of a ResNet, for images (B, C, S, S)."""
        raise NotImplementedError


def save(
    directory: Path,
    encoder: nn.Module,
    spec: EncoderSpec,
    *,
    card: dict[str, Any],
    head: nn.Module | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` and, for a head, `head.safetensors`.

    The encoder loads in timm as it is: `timm.create_model("local-dir:...", pretrained=True)`. Tensors are stored
    as float16.

    Args:
        directory: Where to write; made if it is not there.
        encoder: The encoder, unwrapped.
        spec: Its description.
        card: Facts that travel with the weights, as plain data.
        head: Projector or decoder.

    Raises:
        WeightsError: A value is not finite in float16, such as a BatchNorm statistic above 65,504.
        CheckpointError: The disk refuses.
    """
    modules = {ENCODER_FILE: encoder} | ({HEAD_FILE: head} if head is not None else {})
    parts = {
        file: {name: _half(name, tensor) for name, tensor in module.state_dict().items()}
        for file, module in modules.items()
    }
    for file, tensors in parts.items():  # only now: a value that is refused leaves all files as they were
        save_tensors(directory / file, tensors)
    mean, std = channel_statistics(spec.channels)
    config = {
        "architecture": spec.architecture,
        "num_classes": 0,
        "num_features": feature_dim(encoder),
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
        },
        "vision_ssl": card | {"sha256": {file: file_hash(directory / file) for file in parts}},
    }
    save_json(directory / CONFIG_FILE, config)


def _model_args(spec: EncoderSpec) -> dict[str, Any]:
    return spec.args | ({} if spec.channels == 3 else {"in_chans": spec.channels})


def _half(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        largest = tensor.abs().max().item()
        raise WeightsError(f"{name} has values up to {largest:.3g}, which float16 (65,504 at most) cannot hold")
    return half


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load(
    name: str | os.PathLike[str],
    *,
    num_classes: int = 0,
    pretrained: bool = True,
    image_size: int | None = None,
) -> Encoder:
    """Load an encoder.

    Args:
        name: A model such as `mae_vit_small` or `mae_vit_small.tiny_imagenet`, the `weights` folder of a run, or
            the `model.safetensors` in one.
        num_classes: Width of a new, random classification head; 0 for pooled features.
        pretrained: False for random weights.
        image_size: Side of the input, pixels; by default the checkpoint's. A ViT's position embedding is
            interpolated.

    Returns:
        A timm module in eval mode. Called with (B, C, S, S) it gives pooled features (B, D); `forward_features`
        gives tokens (B, 1 + N, D) for a ViT and a map (B, D, h, w) for a ResNet. `preprocess` turns a Pillow image
        into its input, and `card` says what it was trained on, how, and its measured scores.

    Raises:
        WeightsError: The name is unknown, a file is damaged, or a hash is not the registered one.
        RecipeError: `num_classes` is negative, or the encoder cannot take images of this size.
    """
    if num_classes < 0:
        raise RecipeError(f"num_classes={num_classes} is too small: expected at least 0")
    if image_size is not None and image_size < 1:
        raise RecipeError(f"image_size={image_size} is too small: expected at least 1")
    directory, hashes = _locate(name)
    spec, card = _read_config(directory)
    encoder = spec.build(num_classes)
    if pretrained:
        _fill(encoder, directory / ENCODER_FILE, hashes, new_head=num_classes > 0)
    if image_size is not None and image_size != spec.image_size:
        resize_input(encoder, image_size)
    return attach(encoder, image_size or spec.image_size, spec.channels, card).eval()


def attach(module: nn.Module, image_size: int, channels: int, card: dict[str, Any]) -> Encoder:
    """Give an encoder its `preprocess` and `card`: plain attributes, not part of its state."""
    encoder = cast(Encoder, module)
    encoder.preprocess = Preprocess(image_size, *channel_statistics(channels))
    encoder.card = card
    return encoder


def load_into(model: nn.Module, name: str | os.PathLike[str], *, head_required: bool = False) -> None:
    """Put the weights of `name` into a model's `encoder`, and into its `head` where they fit.

    Args:
        model: Has an `encoder`, a timm module, and a `head`.
        name: As for `load`.
        head_required: Refuse weights whose head is missing or does not fit; otherwise such a head stays as it is.

    Raises:
        WeightsError: The weights are of another architecture, or cannot be read.
    """
    directory, hashes = _locate(name)
    encoder = cast(Any, model.encoder)
    architecture, expected = _read_config(directory)[0].architecture, encoder.pretrained_cfg["architecture"]
    if architecture != expected:  # of the two small stems, either would take the other's tensors
        raise WeightsError(f"{str(name)!r} holds a {architecture}: expected {expected}, as encoder and stem ask for")
    _fill(encoder, directory / ENCODER_FILE, hashes)
    path, head = directory / HEAD_FILE, cast(nn.Module, model.head)
    if head_required or (path.is_file() and _shapes(_read(path, hashes)) == _shapes(head.state_dict())):
        _fill(head, path, hashes)


def read_card(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a model, without loading its weights.

    Raises:
        WeightsError: The name is unknown.
    """
    return _read_config(_locate(name)[0])[1]


def _locate(name: str | os.PathLike[str]) -> tuple[Path, dict[str, str]]:
    """The folder of weights, and the hashes that its files must have."""
    known = find(str(name))
    if known is not None:
        return known.directory, known.sha256
    path = Path(name)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        raise WeightsError(
            f"{path} may hold pickled code, and is not opened: expected a .safetensors file, such as "
            "`vision-ssl import` makes of it"
        )
    directory = path.parent if path.name == ENCODER_FILE else path
    if (directory / "weights" / CONFIG_FILE).is_file():
        directory = directory / "weights"
    if (directory / CONFIG_FILE).is_file():
        return directory, {}
    if path.exists():
        raise WeightsError(f"{path} is not a folder of weights: expected {CONFIG_FILE} and {ENCODER_FILE} in it")
    close = get_close_matches(str(name), [*list_models(), *(n.partition(".")[0] for n in list_models())], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the models are {', '.join(list_models())}"
    raise WeightsError(f"{str(name)!r} is neither a known model nor a path: {hint}")


def _read_config(directory: Path) -> tuple[EncoderSpec, dict[str, Any]]:
    """The encoder and the card that `config.json` describes, if this package could have written it."""
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture, args = config["architecture"], dict(config["model_args"])
        channels, size, _ = config["pretrained_cfg"]["input_size"]
        statistics = tuple(tuple(config["pretrained_cfg"][name]) for name in ("mean", "std"))
        card = dict(config.get("vision_ssl", {}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path} is not the description of an encoder: {reason}") from error
    if str(architecture) not in _ARCHITECTURES:
        raise WeightsError(f"{path} asks for {architecture!r}: expected one of {', '.join(_ARCHITECTURES)}")
    numbers = {"channels": channels, "image size": size, "patch_size": args.get("patch_size", 1)}
    for key, number in numbers.items():
        if type(number) is not int or number < 1:
            raise WeightsError(f"{path} has {key} {number!r}: expected a whole number above 0")
    name, stem = _ARCHITECTURES[architecture]
    patch_size = args.get("patch_size")
    try:
        spec = resolve_encoder(name, image_size=size, stem=stem, patch_size=patch_size, channels=channels)
    except RecipeError as error:
        raise WeightsError(f"{path}: {error}") from error
    if args != _model_args(spec):
        raise WeightsError(f"{path} has model_args {args}: expected {_model_args(spec)}")
    if statistics != channel_statistics(channels):
        raise WeightsError(f"{path} has mean and std {statistics}: expected {channel_statistics(channels)}")
    return spec, card


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read(path: Path, hashes: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of a file whose hash, if it is registered, is the right one."""
    expected = hashes.get(path.name)
    if expected is not None and path.is_file() and (actual := file_hash(path)) != expected:
        raise WeightsError(f"{path} has SHA-256 {actual}, but the registry says {expected}: it is refused")
    try:
        return load_tensors(path)[0]
    except CheckpointError as error:
        raise WeightsError(str(error)) from error


def _fill(module: nn.Module, path: Path, hashes: dict[str, str], *, new_head: bool = False) -> None:
    """Load a file into a module: every tensor has its place, and only a new classifier may be left out."""
    tensors = _read(path, hashes)
    wrong = misfits(tensors, module, may_lack=r"(head|fc)\." if new_head else None)
    if wrong:
        raise WeightsError(f"{path} does not fit {type(module).__name__}: {first_few(wrong)}")
    module.load_state_dict(tensors, strict=False)  # a new head keeps its random weights


def misfits(tensors: dict[str, Tensor], module: nn.Module, *, may_lack: str | None = None) -> list[str]:
    """What keeps tensors from being the state of a module, a line for each name that is wrong, missing or unknown.

    Args:
        tensors: By name.
        module: Where they should go.
        may_lack: Pattern of the beginning of names that may be missing.
    """
    given, needed = _shapes(tensors), _shapes(module.state_dict())
    return [
        f"{name!r} is {given.get(name, 'missing')}, expected {needed.get(name, 'nothing')}"
        for name in dict.fromkeys([*needed, *given])
        if given.get(name) != needed.get(name) and not (may_lack and name not in given and re.match(may_lack, name))
    ]
