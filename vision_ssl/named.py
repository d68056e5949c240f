"""Sources known by name: torchvision's data sets with its own download, and the slice that is packaged."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from .errors import DataError
from .folders import Listing, Split, list_folder

NAMES = ("cifar10", "stl10", "imagenette", "fashion-mnist", "fashion-mnist-mini")

_ASSETS = resources.files(__package__) / "assets"

# (longest side wanted, torchvision's name of the resolution, the folder that it unpacks to)
_IMAGENETTE = (
    (160, "160px", "imagenette2-160"),
    (320, "320px", "imagenette2-320"),
    (sys.maxsize, "full", "imagenette2"),
)


@dataclass(frozen=True)
class LabelledArray:
    """Images in memory: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), and labels int64 (N,) or None."""

    pixels: npt.NDArray[np.uint8] | Tensor
    labels: npt.NDArray[np.int64] | None
    classes: tuple[str, ...]


def photographs() -> dict[str, Image.Image]:
    """Return the packaged photographs by name, RGB; everybody may use and redistribute them."""
    return {name: _asset(f"{name}.jpg") for name in ("chelsea", "coffee", "rocket")}


def open_named(name: str, size: int, split: Split, parts: Sequence[str] | None, root: Path) -> LabelledArray | Listing:
    """Open one of `NAMES`, which torchvision downloads to `root` the first time.

    Args:
        name: A name in `NAMES`.
        size: Side of the images that the caller wants, in pixels: Imagenette comes in three resolutions.
        split: "val" is the test split where there is no validation split.
        parts: For stl10: of "train" (the default) and "unlabeled".
        root: Where downloads go.

    Raises:
        DataError: The download failed, or there are no such parts.
    """
    available = ("train", "unlabeled") if (name, split) == ("stl10", "train") else ()
    if parts is not None and not (parts and set(parts) <= set(available)):
        found = ", ".join(available) or "none"
        raise DataError(f"parts {tuple(parts)}: source {name!r} has these for split {split!r}: {found}")
    if name == "fashion-mnist-mini":
        return _fashion_mnist_mini(split)
    try:
        return _from_torchvision(name, size, split, parts or ("train",), root)
    except (OSError, RuntimeError) as error:
        raise DataError(f"source {name!r}: torchvision cannot get or read it in {root}: {error}") from error


def _from_torchvision(name: str, size: int, split: Split, parts: Sequence[str], root: Path) -> LabelledArray | Listing:
    from torchvision import datasets  # type: ignore[import-untyped]  # it ships no types

    if name == "cifar10":
        return _in_memory(datasets.CIFAR10(root, train=split == "train", download=True))
    if name == "fashion-mnist":
        return _in_memory(datasets.FashionMNIST(root, train=split == "train", download=True))
    if name == "stl10":
        part = "test" if split == "val" else "+".join(sorted(set(parts)))
        return _in_memory(datasets.STL10(root, split=part, download=True))
    resolution, folder = next(row for longest, *row in _IMAGENETTE if size <= longest)
    dataset = datasets.Imagenette(root, split, resolution, download=not (root / folder).exists())
    classes = tuple(names[0] for names in dataset.classes)
    return replace(list_folder(root / folder, split, None), classes=classes, name=f"imagenette/{split}")


def _in_memory(dataset: Any) -> LabelledArray:
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels, dtype=np.int64)
    pixels = np.asarray(dataset.data)
    if labels.min() < 0:  # STL10 marks unlabelled images by -1
        return LabelledArray(pixels, None, ())
    return LabelledArray(pixels, labels, tuple(dataset.classes))


def _fashion_mnist_mini(split: Split) -> LabelledArray:
    """The packaged picture has a row for each class and a column for each of its images of 28 x 28 pixels."""
    from torchvision import datasets

    picture = np.asarray(_asset(f"fashion_mnist_mini_{split}.png"))
    rows, columns = picture.shape[0] // 28, picture.shape[1] // 28
    pixels = picture.reshape(rows, 28, columns, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    return LabelledArray(pixels, np.repeat(np.arange(rows), columns), tuple(datasets.FashionMNIST.classes))


def _asset(name: str) -> Image.Image:
    with (_ASSETS / name).open("rb") as file:
        image = Image.open(file)
        image.load()
    return image
