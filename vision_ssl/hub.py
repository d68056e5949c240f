"""Weights in and out: by name, from a folder, a file or the Hugging Face Hub, in timm's own form."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .cache import first_few
from .config import CONFIG_FILE, to_config
from .data import Preprocess, channel_statistics
from .device import pick_device
from .encoders import EncoderSpec, feature_dim, resize_input
from .errors import RecipeError, WeightsError
from .locate import ENCODER_FILE, HEAD_FILE, Located, file_hash, locate
from .storage import save_json, save_tensors

_MOST_NUMBERS = 1 << 30  # in a model with its head: MAE's largest, a ViT-Huge, has two thirds of it

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # the last is BatchNorm's counter


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
    hashes = {"sha256": {file: file_hash(directory / file) for file in parts}}
    save_json(directory / CONFIG_FILE, to_config(spec, feature_dim(encoder), card | hashes))


def _half(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        largest = tensor.abs().max().item()
        raise WeightsError(f"{name} has values up to {largest:.3g}, which float16 (65,504 at most) cannot hold")
    return half


class LoadOptions(TypedDict, total=False):
    """The keywords of `load`, for functions that pass them on."""

    num_classes: int
    pretrained: bool
    img_size: int | None
    in_chans: int | None
    global_pool: str | None
    dtype: torch.dtype | None
    device: str | torch.device | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


def load(
    name: str | os.PathLike[str],
    *,
    num_classes: int = 0,
    pretrained: bool = True,
    img_size: int | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Encoder:
    """Load an encoder.

    Args:
        name: A model such as `mae_vit_small` or `mae_vit_small.tiny_imagenet_v2`; a run, its `weights` folder, or a
            `.safetensors` file that lies beside its `config.json`; or a repository of the Hugging Face Hub,
            `hf:owner/repo` or `hf:owner/repo@revision`. A model is taken from the package, else from the `weights`
            folder of the clone, else from the cache, else from the Hub.
        num_classes: Width of a new, random classification head; 0 for pooled features.
        pretrained: False for random weights.
        img_size: Side of the input, pixels; by default the checkpoint's. A ViT's position embedding is
            interpolated.
        in_chans: Channels of the input; by default the checkpoint's. Weights for 3 are adapted to others as timm
            does it: the filters are summed for 1, else repeated and scaled.
        global_pool: `avg`, or for a ViT `token` (the class token), or for a ResNet `max` or "" (the map itself); by
            default what the checkpoint was measured with.
        dtype: Of the parameters; by default float32.
        device: Where they go; by default the CPU.
        cache_dir: Where downloads are kept; by default the cache of `huggingface_hub`, whose variables (`HF_HOME`,
            `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`) hold.
        local_files_only: Download nothing.

    Returns:
        A timm module in eval mode. Called with (B, C, S, S) it gives pooled features (B, D); `forward_features`
        gives tokens (B, 1 + N, D) for a ViT and a map (B, D, h, w) for a ResNet. `preprocess` turns a Pillow image
        into its input, and `card` says what it was trained on, how, and its measured scores.

    Raises:
        WeightsError: The name is unknown, the Hub cannot be reached, a file is damaged, or a hash is not the one
            that the registry, the card or the Hub vouches for.
        RecipeError: An option is out of range, or the encoder cannot take it.
    """
    counts = (("num_classes", num_classes, 0), ("img_size", img_size, 1), ("in_chans", in_chans, 1))
    for option, number, least in counts:
        if number is None:
            continue
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise RecipeError(f"{option}={number!r} is not a count: expected a whole number")
        if number < least:
            raise RecipeError(f"{option}={number} is too small: expected at least {least}")
    located = locate(name, cache_dir=cache_dir, local_files_only=local_files_only)
    spec, stored = located.spec, located.spec.channels
    if in_chans not in (None, stored) and stored != 3:
        raise RecipeError(f"in_chans={in_chans} does not fit weights for {stored} channels: only those for 3 adapt")
    spec = replace(spec, channels=in_chans or stored)
    encoder = spec.build(num_classes, global_pool=global_pool)
    if pretrained:
        path, tensors = located.encoder()
        if spec.channels != stored:
            first = f"{spec.first_conv}.weight"
            if first in tensors and tensors[first].ndim == 4 and tensors[first].shape[1] == stored:
                tensors[first] = adapt_input_conv(spec.channels, tensors[first])
        _fill(encoder, path, tensors, new_head=spec.classifier if num_classes else None)
    if img_size is not None and img_size != spec.image_size:
        resize_input(encoder, img_size)
    place(encoder, device, dtype)
    return attach(encoder, img_size or spec.image_size, spec.channels, located.card).eval()


def place(module: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
    """Move a module to a device and its numbers to a precision, in place; None leaves them.

    Raises:
        RecipeError: There is no such device here, or the precision is none for weights.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise RecipeError(f"dtype={dtype!r} is no precision of weights: expected one such as torch.bfloat16")
    module.to(device=None if device is None else pick_device(str(device)), dtype=dtype)


def attach(module: nn.Module, image_size: int, channels: int, card: dict[str, Any]) -> Encoder:
    """Give an encoder its `preprocess` and `card`: plain attributes, not part of its state."""
    encoder = cast(Encoder, module)
    encoder.preprocess = Preprocess(image_size, *channel_statistics(channels))
    encoder.card = card
    return encoder


def load_into(
    model: nn.Module,
    name: str | os.PathLike[str],
    *,
    head_required: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> None:
    """Put the weights of `name` into a model's `encoder`, and into its `head` where they fit.

    Args:
        model: Has an `encoder`, a timm module, and a `head`.
        name: As for `load`.
        head_required: Refuse weights whose head is missing or does not fit; otherwise such a head stays as it is.
        cache_dir: As for `load`.
        local_files_only: As for `load`.

    Raises:
        WeightsError: The weights are of another architecture, or cannot be read.
    """
    located = locate(name, cache_dir=cache_dir, local_files_only=local_files_only)
    _fill_model(model, located, str(name), head_required=head_required, fill=_fill)


def load_model(
    build: Callable[[], nn.Module],
    name: str | os.PathLike[str],
    *,
    pretrained: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Build a model and put all of the weights of `name` into it, as `load_into` does.

    What is to be built comes from a card, and may be larger than memory: so it is built without memory first, and
    in earnest once it is known to be of that size, and that the files fill it.

    Args:
        build: Makes a model with an `encoder` and a `head`.
        name: As for `load`.
        pretrained: False for random weights.
        cache_dir: As for `load`.
        local_files_only: As for `load`.

    Raises:
        WeightsError: The weights are not those of this model, or cannot be read.
    """
    located = locate(name, cache_dir=cache_dir, local_files_only=local_files_only)
    try:
        with torch.device("meta"):
            outline = build()
    except (ArithmeticError, RuntimeError, TypeError) as error:  # a size that not even an outline can have
        raise WeightsError(f"{str(name)!r} has a recipe that cannot be built: {str(error)[:200]!r}") from error
    numbers = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
    if numbers > _MOST_NUMBERS:
        raise WeightsError(
            f"{str(name)!r} has a recipe for {numbers:.2g} numbers: expected at most {_MOST_NUMBERS:.2g}"
        )
    if not pretrained:
        _check_architecture(outline, located, str(name))
        return build()
    _fill_model(outline, located, str(name), head_required=True, fill=_check)
    model = build()
    _fill_model(model, located, str(name), head_required=True, fill=_fill)
    return model


def _fill_model(
    model: nn.Module, located: Located, name: str, *, head_required: bool, fill: Callable[..., None]
) -> None:
    _check_architecture(model, located, name)
    head = cast(nn.Module, model.head)
    fill(model.encoder, *located.encoder())
    if head_required or located.has_head():
        path, tensors = located.head()
        if head_required or _shapes(tensors) == _shapes(head.state_dict()):
            fill(head, path, tensors)


def _check_architecture(model: nn.Module, located: Located, name: str) -> None:
    architecture, expected = located.spec.architecture, cast(Any, model.encoder).pretrained_cfg["architecture"]
    if architecture != expected:  # of the two small stems, either would take the other's tensors
        raise WeightsError(f"{name!r} holds a {architecture}: expected {expected}, as encoder and stem ask for")


def read_card(
    name: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """The card of a model, without loading its weights.

    Raises:
        WeightsError: The name is unknown.
    """
    return locate(name, cache_dir=cache_dir, local_files_only=local_files_only).card


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def misfits(tensors: dict[str, Tensor], module: nn.Module, *, may_lack: str | None = None) -> list[str]:
    """What keeps tensors from being the state of a module, a line for each name that is wrong, missing or unknown.

    Args:
        tensors: By name.
        module: Where they should go.
        may_lack: Pattern of the beginning of names that may be missing.
    """
    given, needed = _shapes(tensors), _shapes(module.state_dict())
    return [
        f"{name[:100]!r} is {str(given.get(name, 'missing'))[:100]}, expected {needed.get(name, 'nothing')}"
        for name in dict.fromkeys([*needed, *given])
        if given.get(name) != needed.get(name) and not (may_lack and name not in given and re.match(may_lack, name))
    ]


def _check(module: nn.Module, path: Path, tensors: dict[str, Tensor], *, new_head: str | None = None) -> None:
    """Refuse tensors unless every one has its place; only a new head may be left out."""
    wrong = misfits(tensors, module, may_lack=rf"{new_head}\." if new_head else None)
    if wrong:
        raise WeightsError(f"{path} does not fit {type(module).__name__}: {first_few(wrong)}")


def _fill(module: nn.Module, path: Path, tensors: dict[str, Tensor], *, new_head: str | None = None) -> None:
    """Put tensors into a module, if they fit and are numbers."""
    _check(module, path, tensors, new_head=new_head)
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise WeightsError(f"{path} has {name} as {tensor.dtype}: expected one of {', '.join(map(str, _TYPES))}")
        if not tensor.isfinite().all():
            raise WeightsError(f"{path} is damaged: {name} has values that are not finite")
    module.load_state_dict(tensors, strict=False)  # a new head keeps its random weights
