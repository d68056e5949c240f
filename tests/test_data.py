import dataclasses
import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]  # it ships no types

from vision_ssl import data
from vision_ssl.data import ImageSet, Preprocess, channel_statistics, default_cache_dir, open_images
from vision_ssl.errors import DataError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def labels_of(images: ImageSet) -> list[int]:
    assert images.labels is not None
    labels: list[int] = images.labels.tolist()
    return labels


def test_a_folder_of_classes(photos: Path) -> None:
    images = open_images(photos, size=16)
    assert images.pixels.shape == (24, 3, 16, 16)
    assert images.pixels.dtype == torch.uint8
    assert images.classes == ("blue", "green", "red")
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    assert labels_of(images) == [0] * 8 + [1] * 8 + [2] * 8
    assert images.paths[:2] == ("blue/0.jpg", "blue/1.jpg")
    assert images.name == "photos"
    assert images.skipped == ()
    brightest = images.pixels.float().mean(dim=(2, 3)).argmax(dim=1)
    assert (brightest == 2 - images.labels).all()


def test_the_digest_follows_pixels_and_labels(photos: Path) -> None:
    first = open_images(str(photos), size=16)
    assert len(first.digest) == len(hashlib.sha256().hexdigest())
    assert open_images(photos, size=16).digest == first.digest
    assert open_images(photos, size=17).digest != first.digest
    (photos / "red").rename(photos / "black")  # now label 0: the same pixels in another order and label
    assert open_images(photos, size=16).digest != first.digest


def test_labels_alone_change_the_digest() -> None:
    pixels = torch.from_numpy(noise(3, 3, 20, 20))
    digests = {
        open_images(source, size=20).digest
        for source in (
            TensorDataset(pixels),
            TensorDataset(pixels, torch.tensor([0, 1, 0])),
            TensorDataset(pixels, torch.tensor([0, 1, 1])),
        )
    }
    assert len(digests) == 3


def test_bad_files_are_skipped_with_one_warning_and_labels_stay_aligned(photos: Path) -> None:
    (photos / "blue" / "3.jpg").write_bytes(b"no picture")
    whole = photos / "green" / "0.jpg"
    message = r"^source photos: skipped 1 of 24 images, which cannot be decoded: blue/3\.jpg \(not an image"
    for _ in range(2):  # decoding, and from the cache
        with pytest.warns(UserWarning, match=message) as warned:
            images = open_images(photos, size=16)
        assert len(warned) == 1
        assert Path(warned[0].filename) == Path(__file__)
    assert images.skipped == ("blue/3.jpg (not an image that Pillow can read)",)
    assert len(images) == 23
    assert labels_of(images) == [0] * 7 + [1] * 8 + [2] * 8
    assert images.paths[7] == "green/0.jpg"
    with Image.open(whole) as image:
        assert torch.equal(images.pixels[7].float() / 255, Preprocess(16, (0.0,) * 3, (1.0,) * 3)(image))
    assert open_images(images, size=16) is images  # and says nothing again


def save_every_kind(folder: Path) -> None:
    folder.mkdir()
    colour, gray = Image.fromarray(noise(33, 51, 3)), Image.fromarray(noise(51, 33))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    colour.save(folder / "colour.png")
    colour.save(folder / "photo.jpg", exif=exif)
    colour.quantize(16).save(folder / "palette.gif")
    colour.convert("CMYK").save(folder / "print.jpg")
    colour.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    gray.save(folder / "gray.jpg")
    gray.convert("1").save(folder / "bits.tiff")
    Image.fromarray(RNG.integers(0, 65536, (40, 30)).astype(np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(noise(300, 1, 3)).save(folder / "thin.bmp")


@pytest.mark.parametrize("size", [16, 33, 64])
def test_preprocess_gives_what_cache_and_normalise_give(size: int, tmp_path: Path) -> None:
    save_every_kind(tmp_path / "kinds")
    images = open_images(tmp_path / "kinds", size=size)
    preprocess = Preprocess(size, *channel_statistics(3))
    batch = preprocess.normalise(images.pixels)
    assert batch.dtype == torch.float32
    assert len(images) == 9
    for path, expected in zip(images.paths, batch, strict=True):
        with Image.open(tmp_path / "kinds" / path) as image:
            assert torch.equal(preprocess(image), expected), path


def test_preprocess_of_one_channel() -> None:
    gray = noise(4, 40, 30)
    preprocess = Preprocess(20, (0.5,), (0.25,))
    images = open_images(gray[:, None], size=20)
    expected = preprocess.normalise(images.pixels)
    assert expected.shape == (4, 1, 20, 20)
    for plane, tensor in zip(gray, expected, strict=True):
        assert torch.equal(preprocess(Image.fromarray(plane)), tensor)


def test_normalise_is_the_formula() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(0 - 0.5) / 0.25, (0.2 - 0.4) / 0.5, (1 - 0.1) / 2])
    torch.testing.assert_close(Preprocess(1, (0.5, 0.4, 0.1), (0.25, 0.5, 2)).normalise(pixels).flatten(), expected)


def test_preprocess_is_plain_data() -> None:
    preprocess = Preprocess(8, (0.5,) * 3, (0.25,) * 3)
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess
    assert hash(preprocess) == hash(dataclasses.replace(preprocess))
    assert not isinstance(preprocess, nn.Module)
    with pytest.raises(dataclasses.FrozenInstanceError):
        preprocess.size = 9  # type: ignore[misc]  # the test


def test_preprocess_refuses_a_picture_for_other_channels() -> None:
    with pytest.raises(DataError, match="a picture has 1 or 3 channels, this encoder takes 5"):
        Preprocess(8, *channel_statistics(5))(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channel_statistics(channels: int) -> None:
    mean, std = channel_statistics(channels)
    assert len(mean) == len(std) == channels
    assert min(std) > 0
    assert (mean[0] == 0.485) == (channels == 3)


@settings(max_examples=20)  # each opens four sources
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(3), st.integers(17, 24), st.integers(17, 24))))
def test_every_axis_order_of_an_array_is_the_same_source(pixels: np.ndarray) -> None:
    last = pixels.transpose(0, 2, 3, 1)
    opened = [open_images(source, size=12) for source in (pixels, last, torch.from_numpy(pixels))]
    assert len({images.digest for images in opened}) == 1
    assert all(torch.equal(images.pixels, opened[0].pixels) for images in opened)
    items: list[np.ndarray] = list(last)
    assert torch.equal(open_images(Listed(items), size=12).pixels, opened[0].pixels)


class Listed(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_an_array_of_the_right_size_stays_where_it_is() -> None:
    pixels = torch.from_numpy(noise(5, 4, 20, 20))
    images = open_images(pixels, size=20)
    assert images.pixels.data_ptr() == pixels.data_ptr()
    assert images.labels is None
    assert images.classes == ()
    assert images.paths == ("0", "1", "2", "3", "4")
    assert images.name == "array"


def test_the_digest_follows_the_shape() -> None:
    pixels = noise(2, 1, 20, 20)
    assert open_images(pixels, size=20).digest != open_images(pixels.reshape(1, 2, 20, 20), size=20).digest


def test_an_array_is_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(5, 20, 20, 3)
    first = open_images(pixels, size=12)
    monkeypatch.delattr(data, "fit_planes")
    second = open_images(pixels, size=12)
    assert second.digest == first.digest
    assert torch.equal(second.pixels, first.pixels)


def test_an_array_that_may_only_be_read() -> None:
    pixels = noise(2, 3, 20, 20)
    pixels.setflags(write=False)
    assert torch.equal(open_images(pixels, size=20).pixels, torch.from_numpy(pixels.copy()))


def test_small_grayscale_digits() -> None:
    digits = noise(30, 8, 8)
    images = open_images(digits, size=8)
    np.testing.assert_array_equal(images.pixels, np.stack([digits] * 3, axis=1))


def test_a_dataset_of_class_folders(photos: Path) -> None:
    images, folder = open_images(ImageFolder(photos), size=16), open_images(photos, size=16)
    assert torch.equal(images.pixels, folder.pixels)
    assert labels_of(images) == labels_of(folder)
    assert images.classes == folder.classes
    assert images.name == "ImageFolder"
    assert images.paths == tuple(map(str, range(24)))


def test_a_dataset_with_a_bad_file(photos: Path) -> None:
    (photos / "blue" / "3.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"source ImageFolder: skipped 1 of 24 images.*: item 3 \(cannot identify"):
        images = open_images(ImageFolder(photos), size=16)
    assert images.paths[2:4] == ("2", "4")
    assert labels_of(images) == [0] * 7 + [1] * 8 + [2] * 8


def test_names_of_classes_where_a_dataset_has_none() -> None:
    pixels = torch.from_numpy(noise(3, 3, 20, 20))
    images = open_images(TensorDataset(pixels, torch.tensor([2, 0, 2])), size=20)
    assert images.classes == ("0", "1", "2")
    dataset = TensorDataset(pixels, torch.tensor([2, 0, 2]))
    dataset.classes = ["cat", "dog"]  # type: ignore[attr-defined]  # too few for label 2
    assert open_images(dataset, size=20).classes == ("0", "1", "2")


def test_a_dataset_that_is_labelled_in_part_has_no_labels() -> None:
    images = open_images(Listed([(noise(20, 20, 3), 1), (noise(20, 20, 3), -1)]), size=20)
    assert images.labels is None
    assert images.classes == ()


def test_a_stream() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for label in (1, 0):
                yield noise(20, 20, 3), label

    images = open_images(Stream(), size=10)
    assert labels_of(images) == [1, 0]


def test_an_open_image_set_passes_through_and_is_resized(photos: Path) -> None:
    images = open_images(photos, size=32)
    assert open_images(images, size=32) is images
    smaller = open_images(images, size=8)
    assert smaller.pixels.shape == (24, 3, 8, 8)
    assert labels_of(smaller) == labels_of(images)
    assert smaller.paths == images.paths
    assert smaller.digest != images.digest
    assert (smaller.pixels.float().mean() - images.pixels.float().mean()).abs() < 1


def test_select(photos: Path) -> None:
    images = open_images(photos, size=16)
    chosen = images.select([20, 3, -1])
    assert torch.equal(chosen.pixels, images.pixels[[20, 3, 23]])
    assert labels_of(chosen) == [2, 0, 2]
    assert chosen.paths == ("red/4.jpg", "blue/3.jpg", "red/7.jpg")
    assert chosen.classes == images.classes
    assert chosen.digest not in (images.digest, images.select([3, 20, -1]).digest)
    mask = torch.tensor(labels_of(images)) == 1
    for other in (mask, mask.numpy(), list(range(8, 16)), np.arange(8, 16), range(8, 16)):
        assert images.select(other).digest == images.select(torch.arange(8, 16)).digest
    assert len(images.select([])) == 0
    with pytest.raises(IndexError):
        images.select([24])


def test_first_classes_are_those_of_the_sorted_names(photos: Path) -> None:
    images = dataclasses.replace(
        open_images(photos, size=16), classes=("wolf", "ant", "cat")
    )  # not in order, as in wnids.txt
    first = images.first_classes(2)
    assert first.classes == ("ant", "cat")
    assert labels_of(first) == [0] * 8 + [1] * 8
    assert torch.equal(first.pixels, images.pixels[8:])
    assert first.paths == images.paths[8:]
    assert first.digest == images.select(range(8, 24)).digest
    assert labels_of(images.first_classes(3)) == [2] * 8 + [0] * 8 + [1] * 8


@pytest.mark.parametrize("count", [0, -1, 4])
def test_more_or_fewer_classes_than_there_are(photos: Path, count: int) -> None:
    images = open_images(photos, size=16)
    with pytest.raises(DataError, match=f"classes={count}: expected 1 to 3, the number of classes"):
        images.first_classes(count)
    with pytest.raises(DataError, match=f"classes={count}: got images without labels"):
        dataclasses.replace(images, labels=None, classes=()).first_classes(count)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder with something wrong below each name."""
    for name in ("empty", "flat", "junk"):
        (tmp_path / name).mkdir()
    Image.fromarray(noise(20, 20, 3)).save(tmp_path / "flat" / "a.png")
    for index in range(10):
        Image.fromarray(noise(20, 20, 3)).save(tmp_path / "junk" / f"{index}.png")
    (tmp_path / "junk" / "0.png").write_bytes(b"")
    (tmp_path / "file.zip").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("empty", {}, r"source {root}/empty: looked for images \(.*\), found no files"),
        ("gone", {}, r"source '{root}/gone': neither a folder \(looked for {root}/gone, .*\) nor one "
                     "of the known names: cifar10, stl10, imagenette, fashion-mnist, fashion-mnist-mini"),
        ("file.zip", {}, "source {root}/file.zip: looked for a folder of images, found a file"),
        ("junk", {}, r"source {root}/junk: 1 of 10 images cannot be decoded, more than 5%: 0\.png \(.*\)"),
        ("flat", {"require_labels": True}, r"source flat: looked for labels \(.*\), found 1 images without"),
        ("flat", {"size": 0}, "size 0: expected at least 1 pixel"),
        ("flat", {"split": "test"}, "split 'test': expected 'train' or 'val'"),
        ("flat", {"parts": ("a",)}, r"parts \('a',\): source {root}/flat has none, .*"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(name: str, options: dict[str, Any], message: str, bad: Path) -> None:
    with pytest.raises(DataError, match=f"^{message.format(root=bad)}$"):
        open_images(bad / name, **{"size": 16, **options})


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "no-such-name",
            {},
            "source 'no-such-name': neither a folder .* nor one of the known names: cifar10",
        ),
        (
            ["a.jpg"],
            {},
            "source of type list: expected a folder or name, a uint8 array or tensor, a torch Data",
        ),
        (None, {}, "source of type NoneType: expected"),
        (
            noise(2, 20, 20),
            {"require_labels": True},
            "source array: looked for labels .*, found 2 images without",
        ),
        (noise(2, 20, 20), {"parts": ("a",)}, r"parts \('a',\): a ndarray has no named parts"),
        (Listed([]), {}, "source Listed: looked for images, found none"),
    ],
)
def test_bad_sources_get_one_line(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}") as raised:
        open_images(source, size=16, **options)
    assert "\n" not in str(raised.value)


def test_a_folder_comes_before_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10").mkdir()
    Image.fromarray(noise(20, 20, 3)).save(tmp_path / "cifar10" / "mine.png")
    monkeypatch.chdir(tmp_path)
    assert open_images("cifar10", size=16).paths == ("mine.png",)


def test_home_is_expanded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(photos.parent))
    assert len(open_images("~/photos", size=16)) == 24


def test_where_the_cache_is(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VISION_SSL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "vision_ssl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "vision_ssl"
    monkeypatch.setenv("VISION_SSL_CACHE", str(tmp_path / "own"))
    open_images(photos, size=16)
    open_images(photos, size=16, cache_dir=tmp_path / "given")
    own, given = ({path.name for path in (tmp_path / name).iterdir()} for name in ("own", "given"))
    assert own == given
    assert not (tmp_path / "xdg").exists()


def test_an_image_set_of_imagenet100_by_parts(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "ssl_dataset"
    root.mkdir()
    for part, folder in (("train.X1", "red"), ("train.X2", "blue"), ("val.X", "green")):
        (root / part).mkdir()
        (photos / folder).rename(root / part / folder)
    (root / "Labels.json").write_text('{"red": "Red", "green": "Green", "blue": "Blue"}')
    assert isinstance(images := open_images(root, size=16, parts=("train.X2",)), ImageSet)
    assert images.name == "ssl_dataset/train.X2"
    assert labels_of(images) == [2] * 8
    assert len(open_images(root, size=16)) == 16
    assert labels_of(open_images(root, size=16, split="val")) == [1] * 8


def test_some_images_of_each_class() -> None:
    images = dataclasses.replace(
        open_images(np.zeros((8, 20, 20, 3), dtype=np.uint8), size=20),
        labels=torch.tensor([0, 1, 1, 2, 1, 0, 1, 1]),
        classes=("a", "b", "c"),
    )
    some = images.per_class(2, seed=1)
    assert some.labels is not None
    assert sorted(some.labels.tolist()) == [0, 0, 1, 1, 2]
    assert some.paths == tuple(sorted(some.paths))
    drawn = {images.per_class(2, seed=seed).paths for seed in range(20)}
    assert len(drawn) > 3
    assert images.per_class(2, seed=1).digest == some.digest != images.digest
    with pytest.raises(DataError, match=r"^per_class=2: got images without labels, expected labelled ones$"):
        dataclasses.replace(images, labels=None, classes=()).per_class(2)
