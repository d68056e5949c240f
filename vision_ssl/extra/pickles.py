"""Checkpoints of other programs, read as plain data: nothing in a file ever runs."""

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, WeightsError
from ..storage import load_tensors


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, whoever wrote it.

    A `.safetensors` file holds tensors alone. Anything else is a pickle, of which torch's own restricted reader
    builds tensors and plain containers; the one further class that it may build here is `argparse.Namespace`, in
    which facebookresearch/mae and timm keep their options: its instances are plain attributes, and its class has no
    method that reading one would call.

    Raises:
        WeightsError: The file is missing or damaged, or holds objects of other classes.
    """
    if not path.is_file():
        raise WeightsError(f"file={str(path)!r} is not a file: expected a checkpoint")
    if path.suffix == ".safetensors":
        try:
            return dict(load_tensors(path)[0])
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the file is no news: it is read, or refused
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes are anybody's, and so is the kind of what they make torch raise
        raise WeightsError(_refusal(path, error)) from error
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}: expected a dictionary of tensors")
    return dict(checkpoint)


def _refusal(path: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused is None:
        reason = " ".join(str(error).split())[:200]
        return f"{path} cannot be read as tensors and plain data: {type(error).__name__}: {reason}"
    return (
        f"{path} holds a pickled {refused[1]}, which could run code, and is not opened: where it was made, save the "
        'tensors alone, as torch.save(model.state_dict(), "weights.pth")'
    )


def flatten(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of nested dictionaries and lists by dotted names, without the wrappers `module.` and `_orig_mod.`.

    DataParallel and torch.compile add these wherever they wrap a module. What is met twice counts once.

    Raises:
        WeightsError: There are no tensors, one of them is not plain, or two get the same name.
    """
    tensors: dict[str, Tensor] = {}
    nodes: list[tuple[str, Any]] = [("", checkpoint)]
    seen = set()  # a pickle may hold itself
    while nodes:
        path, node = nodes.pop()
        if isinstance(node, Tensor):
            name = re.sub(r"(?<![^.])(?:module|_orig_mod)\.", "", path)
            if name in tensors:
                raise WeightsError(f"{path!r} is there with and without its wrapper: expected each tensor once")
            if node.layout != torch.strided or node.device.type != "cpu" or node.is_quantized or node.is_complex():
                raise WeightsError(f"{path!r} is a {node.type()}: expected a plain tensor of real numbers")
            tensors[name] = node
        elif isinstance(node, Mapping | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            inside = node.items() if isinstance(node, Mapping) else enumerate(node)
            nodes += reversed([(f"{path}.{key}" if path else str(key), value) for key, value in inside])
    if not tensors:
        raise WeightsError("the file holds no tensors by name: expected a state dict")
    return tensors
