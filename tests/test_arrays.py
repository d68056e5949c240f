from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from vision_ssl.arrays import channels_first, dataset_images
from vision_ssl.cache import Bad
from vision_ssl.decode import Pixels, decode
from vision_ssl.errors import DataError

LONG = st.integers(17, 40)


@given(st.integers(1, 5), st.integers(1, 16), LONG, LONG)
def test_the_channel_axis_is_found(count: int, channels: int, height: int, width: int) -> None:
    size = count * channels * height * width
    first = (np.arange(size) % 251).astype(np.uint8).reshape(count, channels, height, width)
    np.testing.assert_array_equal(channels_first(first), first)
    np.testing.assert_array_equal(channels_first(first.transpose(0, 2, 3, 1)), first)
    np.testing.assert_array_equal(channels_first(torch.from_numpy(first)), first)


@pytest.mark.parametrize("shape", [(5, 30, 20), (5, 8, 8), (5, 1, 1)])
def test_grayscale_becomes_three_equal_channels(shape: tuple[int, int, int]) -> None:
    gray = (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)
    np.testing.assert_array_equal(channels_first(gray), np.stack([gray] * 3, axis=1))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((4, 3, 32, 32), np.float32),
            r"got float32 of shape \(4, 3, 32, 32\), expected uint8 \(0\.\.255\)",
        ),
        (torch.zeros((4, 3, 32, 32), dtype=torch.int64), r"got int64 .* expected uint8"),
        (np.zeros((0, 3, 32, 32), np.uint8), "expected at least one image"),
        (np.zeros((4, 3, 32, 16), np.uint8), "expected one of axes 1 and 3, the channels, at most 16 long"),
        (np.zeros((4, 17, 32, 17), np.uint8), "expected one of axes 1 and 3, the channels, at most 16 long"),
        (np.zeros((32, 32, 3), np.uint8), "looks like one image; expected"),
        (np.zeros((32, 3, 32), np.uint8), "looks like one image; expected"),
        (np.zeros((32, 32), np.uint8), r"got uint8 of shape \(32, 32\), expected \(N, H, W\)"),
    ],
)
def test_arrays_that_are_refused(array: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^source array: .*{message}"):
        channels_first(array)


class Items(Dataset[Any]):
    """A map-style Dataset of given items; an exception among them is raised."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def go_through(dataset: Dataset[Any], size: int = 20) -> tuple[list[Pixels | Bad], list[int | None]]:
    labels: list[int | None] = []
    return list(dataset_images(dataset, size, "data", labels)), labels


COLOUR = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
GRAY = COLOUR[:, :, 0]
TENSOR = torch.from_numpy(COLOUR).permute(2, 0, 1)


@pytest.mark.parametrize("size", [12, 20])
@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray(COLOUR),
        COLOUR,
        TENSOR,
        TENSOR / 255,
        (TENSOR / 255).numpy(),
        ((TENSOR - 0.4) / 255).clamp(min=0),
    ],
)
def test_every_kind_of_colour_item_gives_the_same_pixels(item: Any, size: int) -> None:
    (pixels,), labels = go_through(Items(item), size)
    np.testing.assert_array_equal(pixels, decode(Image.fromarray(COLOUR), size))
    assert labels == [None]


@pytest.mark.parametrize("item", [Image.fromarray(GRAY), GRAY, torch.from_numpy(GRAY.copy()) / 255])
def test_every_kind_of_gray_item_gives_the_same_pixels(item: Any) -> None:
    (pixels,), _ = go_through(Items(item), 12)
    np.testing.assert_array_equal(pixels, decode(Image.fromarray(GRAY), 12))


def test_any_number_of_channels() -> None:
    (pixels,), _ = go_through(Items(torch.zeros(5, 20, 24, dtype=torch.uint8)))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (5, 20, 20)


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), torch.tensor([3]), 3.0])
def test_labels(label: Any) -> None:
    assert go_through(Items((COLOUR, label), [COLOUR, None], (COLOUR, -1)))[1] == [3, None, None]


def test_datasets_of_torch() -> None:
    images = TENSOR[None].repeat(3, 1, 1, 1)
    assert go_through(TensorDataset(images))[1] == [None, None, None]
    assert go_through(TensorDataset(images, torch.tensor([2, 0, 1])))[1] == [2, 0, 1]
    assert len(go_through(Stream(COLOUR, COLOUR))[0]) == 2


def test_items_that_cannot_be_read_are_left_out_with_their_labels(tmp_path: Any) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "photo.png")
    (tmp_path / "photo.png").write_bytes((tmp_path / "photo.png").read_bytes()[:300])
    with Image.open(tmp_path / "photo.png") as broken:  # opens, and fails when its pixels are needed
        items = Items((COLOUR, 5), UnidentifiedImageError("what is it"), (broken, 6), (COLOUR, 7))
        images, labels = go_through(items)
    assert [type(image) for image in images] == [np.ndarray, Bad, Bad, np.ndarray]
    assert images[1] == Bad("item 1", "what is it")
    assert str(images[2]).startswith("item 2 (")
    assert labels == [5, 7]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((COLOUR, 1, 2), r"item 1 has 3 parts, expected an image or \(image, label\)"),
        ((COLOUR, "cat"), "item 1 has label 'cat', expected an integer"),
        ((COLOUR, torch.tensor([0, 1])), r"item 1 has label tensor\(\[0, 1\]\), expected an integer"),
        ("cat.jpg", "item 1 is a str, expected a Pillow image, an array or a tensor"),
        (COLOUR[:, :, :2], "item 1 has 2 channels, those before it have 3"),
        (TENSOR / 127.5 - 1, "item 1 holds floats from -1 to 1, expected .*: leave out Normalize"),
        (TENSOR / 2, "item 1 holds floats from 0 to 12[0-9], expected"),
        (TENSOR * torch.nan, "item 1 holds floats from nan to nan, expected"),
        (COLOUR.astype(np.int32), r"item 1: got int32 of shape \(1, 20, 24, 3\), expected uint8"),
        (COLOUR[None], r"item 1: got uint8 of shape \(1, 1, 20, 24, 3\), expected"),
    ],
)
def test_items_that_are_refused(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^source data: {message}"):
        go_through(Items(COLOUR, item))


def test_errors_of_the_datasets_own_code_come_through() -> None:
    with pytest.raises(ZeroDivisionError):
        go_through(Items(ZeroDivisionError()))


def test_a_dataset_without_length() -> None:
    class Endless(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return COLOUR

    with pytest.raises(DataError, match=r"^source Endless: expected a Dataset with a length"):
        go_through(Endless())
