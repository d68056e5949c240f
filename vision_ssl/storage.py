"""Files of tensors and text that appear whole or not at all, and are read with errors that name them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: neither a crash nor a full disk leaves half a file.

    Args:
        path: The file; its folder is made if it is not there.
        write: Given another path, writes the file there; what it raises leaves `path` as it was.

    Raises:
        CheckpointError: The disk refuses.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            with beside.open("rb") as file:
                os.fsync(file.fileno())  # otherwise a power cut could keep the new name without the content
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; what was there before is unharmed") from error


def check_new_folder(out: Path) -> None:
    """Refuse to write into a folder that holds something.

    Raises:
        CheckpointError: `out` is there, and neither a folder nor empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"out={str(out)!r} is there already: expected a new or an empty folder")


def save_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        CheckpointError: The disk refuses.
    """
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def save_json(path: Path, data: dict[str, Any]) -> None:
    """Write readable JSON.

    Raises:
        CheckpointError: The disk refuses.
    """
    save_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Write named tensors, with plain facts in the header, as safetensors.

    Raises:
        CheckpointError: The disk refuses.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {name: json.dumps(fact) for name, fact in (facts or {}).items()}
    write_whole(path, lambda beside: save_file(whole, beside, metadata={"format": "pt", **header}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors and the facts.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, RuntimeError, SafetensorError) as error:  # a RuntimeError: there is no room for what it holds
        reason = " ".join(str(error).split())[:200]  # it may repeat what a hostile file holds
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {reason}") from error
    header.pop("format", None)
    return tensors, {name: _fact(text) for name, text in header.items()}


def _fact(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a file from elsewhere
        return text
