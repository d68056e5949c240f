"""Open any source of images as one uint8 tensor, and the preprocessing that matches it."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from . import cache
from .arrays import channels_first, dataset_images
from .decode import Pixels, decode, fit_planes
from .device import constant
from .errors import DataError
from .folders import Listing, Split, list_folder
from .named import NAMES, LabelledArray, open_named, photographs

__all__ = [
    "ImageSet",
    "Preprocess",
    "Source",
    "Split",
    "channel_statistics",
    "default_cache_dir",
    "open_images",
    "photographs",
]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, decoded.

    Attributes:
        pixels: uint8 (n, C, S, S), memory-mapped where it comes from the cache.
        labels: int64 (n,), or None.
        classes: Class names in label order; () without labels.
        paths: Where each image came from: a relative path, or its index as text.
        name: Short name of the source, such as "tiny-imagenet-200/train".
        digest: sha256 hex that identifies the images and labels, 64 characters.
        skipped: What could not be decoded and is left out, each with the reason in brackets.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    name: str
    digest: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    def select(self, indices: Sequence[int] | Tensor | npt.NDArray[Any]) -> "ImageSet":
        """Return a copy of the images at `indices`, or where a mask is true; class names stay as they are."""
        index = torch.arange(len(self))[torch.as_tensor(indices, dtype=None if len(indices) else torch.int64)]
        return replace(
            self,
            pixels=self.pixels[index],
            labels=None if self.labels is None else self.labels[index],
            paths=tuple(self.paths[i] for i in index.tolist()),
            digest=_digest(self.digest, index),
        )

    def first_classes(self, count: int) -> "ImageSet":
        """Return a copy of the images of the first `count` classes by name, which are numbered anew.

        Of Tiny ImageNet, the first 100 of its sorted class ids are a usual subset.

        Raises:
            DataError: There are no labels, or fewer than `count` classes.
        """
        index, labels, classes = first_classes(self.labels, self.classes, count)
        return replace(self.select(index), labels=labels, classes=classes)

    def per_class(self, count: int, *, seed: int = 0) -> "ImageSet":
        """Return at most `count` images of each class, drawn at random, in their order; itself if that is all.

        Raises:
            DataError: There are no labels.
        """
        if self.labels is None:
            raise DataError(f"per_class={count}: got images without labels, expected labelled ones")
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        labels = self.labels[shuffled]
        chosen = torch.cat([shuffled[labels == label][:count] for label in labels.unique()])
        return self if len(chosen) == len(self) else self.select(chosen.sort().values)


def first_classes(labels: Tensor | None, classes: Sequence[str], count: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Find what belongs to the first `count` of the sorted classes.

    Args:
        labels: int64 (n,).
        classes: Class names in label order.
        count: How many classes to keep, at least 1.

    Returns:
        Indices int64 (m,) of the labels to keep, their new labels int64 (m,), and the sorted class names.

    Raises:
        DataError: There are no labels, or fewer than `count` classes.
    """
    if labels is None:
        raise DataError(f"classes={count}: got images without labels, expected labelled ones")
    if not 1 <= count <= len(classes):
        raise DataError(f"classes={count}: expected 1 to {len(classes)}, the number of classes")
    chosen = sorted(classes)[:count]
    number = {name: label for label, name in enumerate(chosen)}
    new_labels = torch.tensor([number.get(name, -1) for name in classes])[labels]
    kept = (new_labels >= 0).nonzero()[:, 0]
    return kept, new_labels[kept], tuple(chosen)


Source: TypeAlias = "str | os.PathLike[str] | Dataset[Any] | npt.NDArray[np.uint8] | Tensor | ImageSet"


@dataclass(frozen=True)
class Preprocess:
    """A checkpoint's own preprocessing, from any Pillow image to the tensor that its encoder takes.

    Attributes:
        size: Side of the square, in pixels.
        mean: For each channel, in units of [0, 1]; one value for grayscale, three for RGB.
        std: Likewise.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """Decode and normalise one image.

        Bit for bit `normalise` of what `open_images` holds for the same file. Only a JPEG of more than 16
        million pixels, which the cache reads at a reduced scale to save memory, is merely close.

        Returns:
            float32 (C, size, size).

        Raises:
            DataError: The encoder takes neither 1 nor 3 channels, or the pixels have no agreed range.
        """
        if len(self.mean) not in (1, 3):
            raise DataError(f"preprocess: a picture has 1 or 3 channels, this encoder takes {len(self.mean)}")
        pixels = decode(image, self.size, "L" if len(self.mean) == 1 else "RGB")
        return self.normalise(torch.from_numpy(pixels)[None])[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale uint8 (B, C, S, S) to [0, 1], subtract `mean`, divide by `std`: float32 of the same shape."""
        return normalise(pixels.float() / 255, self.mean, self.std)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract `mean` and divide by `std`, one of each a channel, from images (B, C, H, W) in [0, 1]."""
    shift, scale = (constant(numbers, images.device)[:, None, None] for numbers in (mean, std))
    return (images - shift) / scale


def channel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel in [0, 1]: ImageNet's for RGB, else 0.5 and 0.25."""
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,) * channels, (0.25,) * channels


def default_cache_dir() -> Path:
    """Return $VISION_SSL_CACHE, or vision_ssl in $XDG_CACHE_HOME, or ~/.cache/vision_ssl."""
    own = os.environ.get("VISION_SSL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vision_ssl"


def open_images(
    source: Source,
    *,
    size: int,
    split: Split = "train",
    parts: Sequence[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    require_labels: bool = False,
) -> ImageSet:
    """Open any source of images, decoded once: shorter side resized to `size`, centre crop, uint8.

    Files are decoded into a memory-mapped cache named by their content: the second time is quick, and large
    sources need little memory. Arrays that have the right size already stay where they are.

    Args:
        source: One of

            - a folder of images at any depth; labelled when each lies in one of at least two sub-folders;
            - a folder with train/ and val/ (or test/), Tiny ImageNet, or ImageNet-100 with its Labels.json;
            - "cifar10", "stl10", "imagenette", "fashion-mnist" (downloaded by torchvision), or the packaged
              "fashion-mnist-mini"; a folder of that name comes first;
            - a uint8 array or tensor (N, H, W), (N, H, W, C) or (N, C, H, W), with at most 16 channels;
            - a torch Dataset of images or (image, label): Pillow images, uint8 arrays, floats in [0, 1]. It
              is gone through once, so its random transforms freeze;
            - an ImageSet.
        size: Side of the square images, in pixels.
        split: Which split, where the source has several.
        parts: Which parts of the split, where it has several: ("train.X1", ...) of ImageNet-100,
            ("unlabeled",) of stl10.
        cache_dir: Where the cache and downloads go; `default_cache_dir()` by default.
        require_labels: Refuse a source without labels.

    Returns:
        The images, RGB unless an array says otherwise.

    Raises:
        DataError: The source does not exist or holds no images, is ambiguous, lacks labels that are required,
            more than 5 % of it cannot be decoded, or the disk is too small.

    Warns:
        UserWarning: Once for all files that could not be decoded and were left out.
    """
    if size < 1:
        raise DataError(f"size {size}: expected at least 1 pixel")
    if split not in ("train", "val"):
        raise DataError(f"split {split!r}: expected 'train' or 'val'")
    directory = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    if isinstance(source, (str, os.PathLike)):
        images = _open_path(source, size, split, parts, directory)
    elif parts is not None:
        raise DataError(f"parts {tuple(parts)}: a {type(source).__name__} has no named parts")
    elif isinstance(source, ImageSet):
        images = _resized(source, size, directory)
    elif isinstance(source, (np.ndarray, Tensor)):
        images = _open_array(LabelledArray(source, None, ()), "array", size, directory)
    elif isinstance(source, Dataset):
        images = _open_dataset(source, size, directory)
    else:
        raise DataError(
            f"source of type {type(source).__name__}: expected a folder or name, a uint8 array or tensor, a "
            "torch Dataset, or an ImageSet"
        )
    if images.skipped and not isinstance(source, ImageSet):
        warnings.warn(
            f"source {images.name}: skipped {len(images.skipped):,} of {len(images) + len(images.skipped):,} "
            f"images, which cannot be decoded: {cache.first_few(images.skipped)}",
            stacklevel=2,
        )
    if require_labels and images.labels is None:
        raise DataError(
            f"source {images.name}: looked for labels (two or more class folders, or items (image, label)), "
            f"found {len(images):,} images without"
        )
    return images


def _resized(images: ImageSet, size: int, directory: Path) -> ImageSet:
    if images.pixels.shape[2:] == (size, size):
        return images
    cached = _fit(images.pixels.numpy(), images.digest, images.name, size, directory)
    return replace(images, pixels=cached.pixels, digest=cached.digest)


def _open_path(
    source: str | os.PathLike[str], size: int, split: Split, parts: Sequence[str] | None, directory: Path
) -> ImageSet:
    folder = Path(source).expanduser()
    name = str(source).lower()
    if folder.is_dir():
        return _open_listing(list_folder(folder, split, parts), size, directory)
    if folder.exists():
        raise DataError(f"source {folder}: looked for a folder of images, found a file")
    if name not in NAMES:
        raise DataError(
            f"source {str(source)!r}: neither a folder (looked for {folder.absolute()}, found nothing) nor "
            f"one of the known names: {', '.join(NAMES)}"
        )
    opened = open_named(name, size, split, parts, directory / "downloads")
    if isinstance(opened, Listing):
        return _open_listing(opened, size, directory)
    return _open_array(opened, f"{name}/{'+'.join(parts) if parts else split}", size, directory)


def _open_listing(listing: Listing, size: int, directory: Path) -> ImageSet:
    cached = cache.files(listing.root, listing.paths, size, directory)
    kept = [index for index in range(len(listing.paths)) if index not in cached.skipped]
    labels = None if listing.labels is None else [listing.labels[index] for index in kept]
    return _image_set(cached, labels, listing.classes, [listing.paths[index] for index in kept], listing.name)


def _open_array(array: LabelledArray, name: str, size: int, directory: Path) -> ImageSet:
    pixels = channels_first(array.pixels, name)
    content = hashlib.sha256(repr(pixels.shape).encode())
    for image in pixels:
        content.update(np.ascontiguousarray(image).data)
    cached = _fit(pixels, content.hexdigest(), name, size, directory)
    return _image_set(cached, array.labels, array.classes, range(len(pixels)), name)


def _open_dataset(dataset: Dataset[Any], size: int, directory: Path) -> ImageSet:
    name = type(dataset).__name__
    labels: list[int | None] = []
    count = len(dataset) if isinstance(dataset, Sized) else None
    cached = cache.fill(directory, name, dataset_images(dataset, size, name, labels), count)
    kept = [index for index in range(len(labels) + len(cached.skipped)) if index not in cached.skipped]
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        return _image_set(cached, None, (), kept, name)
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, (list, tuple)) or len(classes) <= max(known):
        classes = range(max(known) + 1)
    return _image_set(cached, known, classes, kept, name)


def _fit(pixels: Pixels, content: str, name: str, size: int, directory: Path) -> cache.Cached:
    """Images (N, C, H, W) of digest `content`: as they are if the size is right, else through the cache."""
    if pixels.shape[2:] == (size, size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on read-only arrays; nothing here writes to them
            return cache.Cached(torch.from_numpy(np.ascontiguousarray(pixels)), content, {})
    digest = cache.resized_digest(content, size)
    resized = (fit_planes(image, size) for image in pixels)
    return cache.find(directory, digest) or cache.fill(directory, name, resized, len(pixels), digest)


def _image_set(
    cached: cache.Cached,
    labels: Sequence[int] | npt.NDArray[np.int64] | None,
    classes: Iterable[object],
    paths: Iterable[object],
    name: str,
) -> ImageSet:
    labelled = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    return ImageSet(
        pixels=cached.pixels,
        labels=labelled,
        classes=tuple(map(str, classes)),
        paths=tuple(map(str, paths)),
        name=name,
        digest=_digest(cached.digest, labelled),
        skipped=tuple(map(str, cached.skipped.values())),
    )


def _digest(content: str, numbers: Tensor | None) -> str:
    data = b"" if numbers is None else numbers.numpy().tobytes()
    return hashlib.sha256(content.encode() + data).hexdigest()
