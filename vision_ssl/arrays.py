"""Images that somebody else decoded: arrays, tensors and the items of torch Datasets, in one axis order."""

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .cache import Bad
from .decode import Pixels, decode, fit_planes
from .errors import DataError

# An axis this short holds channels; a longer one is a height or a width.
MAX_CHANNELS = 16


def channels_first(array: npt.NDArray[Any] | Tensor, name: str = "array") -> Pixels:
    """View uint8 images as (N, C, H, W), wherever their channel axis is.

    Args:
        array: (N, C, H, W) or (N, H, W, C), told apart by which axis is at most 16 long; or (N, H, W), which
            is grayscale and becomes three equal channels.
        name: What error messages call the array.

    Raises:
        DataError: Not uint8, empty, of another number of axes, or either order is possible.
    """
    pixels = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    given = f"source {name}: got {pixels.dtype} of shape {pixels.shape}"
    shapes = "expected (N, H, W), (N, H, W, C) or (N, C, H, W)"
    if pixels.dtype != np.uint8:
        raise DataError(f"{given}, expected uint8 (0..255)")
    if pixels.size == 0:
        raise DataError(f"{given}, expected at least one image")
    if pixels.ndim == 3:
        if (pixels.shape[1] <= MAX_CHANNELS) != (pixels.shape[2] <= MAX_CHANNELS):
            raise DataError(f"{given}, which looks like one image; {shapes}")
        return np.broadcast_to(pixels[:, None], (len(pixels), 3, *pixels.shape[1:]))
    if pixels.ndim != 4:
        raise DataError(f"{given}, {shapes}")
    first, last = pixels.shape[1] <= MAX_CHANNELS, pixels.shape[3] <= MAX_CHANNELS
    if first == last:
        raise DataError(f"{given}: expected one of axes 1 and 3, the channels, at most {MAX_CHANNELS} long")
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def dataset_images(dataset: Dataset[Any], size: int, name: str, labels: list[int | None]) -> Iterator[Pixels | Bad]:
    """Go through a Dataset once.

    Args:
        dataset: Its items are images or (image, label).
        size: Side of the square images that come out, in pixels.
        name: What error messages call the Dataset.
        labels: Filled on the way with the label of each image that comes out, or None.

    Yields:
        uint8 (C, size, size), or an item that could not be read.

    Raises:
        DataError: An item is neither an image nor (image, label), or differs in channels from those before.
    """
    channels: int | None = None
    for index, item in enumerate(_items(dataset)):
        where = f"source {name}: item {index}"
        if isinstance(item, Bad):
            yield item
            continue
        image, label = _image_and_label(item, where)
        try:
            pixels = _square(image, size, where)
        except OSError as error:  # Pillow opens files lazily: the damage shows only here
            yield Bad(f"item {index}", str(error))
            continue
        channels = channels or len(pixels)
        if len(pixels) != channels:
            raise DataError(f"{where} has {len(pixels)} channels, those before it have {channels}")
        labels.append(label)
        yield pixels


def _items(dataset: Dataset[Any]) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset):
        yield from dataset
        return
    if not isinstance(dataset, Sized):
        raise DataError(f"source {type(dataset).__name__}: expected a Dataset with a length")
    for index in range(len(dataset)):
        try:
            yield dataset[index]
        except OSError as error:  # a damaged file, as ImageFolder reports it
            yield Bad(f"item {index}", str(error))


def _image_and_label(item: Any, where: str) -> tuple[Any, int | None]:
    if not isinstance(item, (tuple, list)):
        return item, None
    if len(item) == 1:  # TensorDataset without labels
        return item[0], None
    if len(item) != 2:
        raise DataError(f"{where} has {len(item)} parts, expected an image or (image, label)")
    image, label = item
    if label is None:
        return image, None
    try:
        number = int(label)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} has label {label!r}, expected an integer") from error
    return image, number if number >= 0 else None  # torchvision marks unlabelled images by -1


def _square(image: Any, size: int, where: str) -> Pixels:
    if isinstance(image, Image.Image):
        return decode(image, size)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise DataError(f"{where} is a {type(image).__name__}, expected a Pillow image, an array or a tensor")
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            found = f"floats from {array.min():.3g} to {array.max():.3g}"
            raise DataError(f"{where} holds {found}, expected 0..1: leave out Normalize")
        array = np.round(array * 255).astype(np.uint8)
    pixels = channels_first(array[None], where.removeprefix("source "))[0]
    return pixels if pixels.shape[1:] == (size, size) else fit_planes(pixels, size)
