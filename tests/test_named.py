import gzip
import hashlib
import importlib.util
import pickle
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets  # type: ignore[import-untyped]  # it ships no types

from vision_ssl import named
from vision_ssl.data import open_images
from vision_ssl.errors import DataError
from vision_ssl.folders import Listing
from vision_ssl.named import LabelledArray, open_named, photographs

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("split", ["train", "val"])
def test_packaged_slice_of_fashion_mnist(split: Any) -> None:
    images = open_images("fashion-mnist-mini", size=28, split=split)
    assert images.pixels.shape == (1000, 3, 28, 28)
    assert images.name == f"fashion-mnist-mini/{split}"
    assert images.labels is not None
    assert images.labels.bincount().tolist() == [100] * 10
    assert images.classes[:3] == ("T-shirt/top", "Trouser", "Pullover")
    assert len({image.numpy().tobytes() for image in images.pixels}) >= 998  # neither rows nor columns mixed up


def test_the_packaged_classes_look_as_they_should() -> None:
    images = open_images("fashion-mnist-mini", size=28)
    by_class = images.pixels.float().view(10, 100, 3, 28, 28).mean(dim=(1, 2))
    mean = dict(zip(images.classes, by_class, strict=True))
    assert mean["Trouser"][:, :6].max() < 20  # trousers are narrow
    assert mean["Pullover"][:, :6].mean() > 30  # sleeves reach the edge
    assert mean["Sneaker"][:6].max() < 20  # shoes are flat


def test_packaged_slices_share_no_image() -> None:
    train, val = (open_images("fashion-mnist-mini", size=28, split=split) for split in ("train", "val"))
    assert not {image.numpy().tobytes() for image in train.pixels} & {image.numpy().tobytes() for image in val.pixels}


def test_photographs() -> None:
    pictures = photographs()
    assert {name: picture.size for name, picture in pictures.items()} == {
        "chelsea": (451, 300),
        "coffee": (600, 400),
        "rocket": (640, 427),
    }
    assert all(picture.mode == "RGB" for picture in pictures.values())


def test_packaged_data_is_small_and_has_its_notices() -> None:
    files = {file.name: Path(str(file)).stat().st_size for file in named._ASSETS.iterdir()}
    notice = (named._ASSETS / "NOTICE.md").read_text()
    assert sum(files.values()) <= 3_000_000
    assert all(name in notice for name in files if name != "NOTICE.md")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_assets_are_read_as_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location(
        "make_assets", Path(__file__).parents[1] / "benchmarks/make_assets.py"
    )
    assert specification is not None
    assert specification.loader is not None
    make_assets = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make_assets)
    monkeypatch.setattr(make_assets, "ASSETS", tmp_path)
    monkeypatch.setattr(named, "_ASSETS", tmp_path)

    images = RNG.integers(0, 256, (1100, 28, 28), dtype=np.uint8)
    labels = RNG.permutation(np.repeat(np.arange(10, dtype=np.uint8), 110))
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    Image.new("RGBA", (4, 4)).save(tmp_path / "chelsea.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "coffee.png")
    source = tmp_path / "source"
    source.mkdir()
    Image.new("RGB", (4, 4)).save(source / "rocket.jpg")
    for name in ("chelsea.png", "coffee.png"):
        (tmp_path / name).rename(source / name)
    make_assets.main(tmp_path, source)

    array = open_named("fashion-mnist-mini", 28, "val", None, tmp_path)
    assert isinstance(array, LabelledArray)
    expected = np.concatenate([images[labels == label][:100] for label in range(10)])
    np.testing.assert_array_equal(array.pixels, expected)
    assert array.labels is not None
    assert array.labels.tolist() == sorted(list(range(10)) * 100)
    assert set(photographs()) == {"chelsea", "coffee", "rocket"}


def test_fashion_mnist(cache_dir: Path) -> None:
    folder = cache_dir / "downloads" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for prefix, count in (("train", 12), ("t10k", 5)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", pixels[:count])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    train = open_images("fashion-mnist", size=28, cache_dir=cache_dir)
    val = open_images("Fashion-MNIST", size=28, split="val", cache_dir=cache_dir)
    assert (train.name, val.name) == ("fashion-mnist/train", "fashion-mnist/val")
    np.testing.assert_array_equal(train.pixels, np.stack([pixels] * 3, 1))
    assert train.labels is not None
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert len(val) == 5
    assert val.classes[9] == "Ankle boot"


def test_cifar10(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_dir / "downloads" / "cifar-10-batches-py"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(6, -1), "labels": [3, 1, 4, 1, 5, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    meta = {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    images = open_images("cifar10", size=32, cache_dir=cache_dir)
    np.testing.assert_array_equal(images.pixels, pixels)
    assert images.labels is not None
    assert images.labels.tolist() == [3, 1, 4, 1, 5, 9]
    assert images.classes == tuple("abcdefghij")


@pytest.fixture
def stl10(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = cache_dir / "downloads" / "stl10_binary"
    folder.mkdir()
    for part, value in (("train", 10), ("unlabeled", 20), ("test", 30)):
        (folder / f"{part}_X.bin").write_bytes(bytes([value]) * (2 * 3 * 96 * 96))
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 2]))
    (folder / "class_names.txt").write_text("plane\nbird\n")
    files = {name: [name, md5(folder / name)] for name in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")}
    monkeypatch.setattr(datasets.STL10, "train_list", list(files.values()))
    tests = [[name, md5(folder / name)] for name in ("test_X.bin", "test_y.bin")]
    monkeypatch.setattr(datasets.STL10, "test_list", tests)
    return cache_dir


@pytest.mark.parametrize(
    ("split", "parts", "values", "labels", "name"),
    [
        ("train", None, [10, 10], [0, 1], "stl10/train"),
        ("val", None, [30, 30], [0, 1], "stl10/val"),
        ("train", ("unlabeled",), [20, 20], None, "stl10/unlabeled"),
        ("train", ("unlabeled", "train"), [10, 10, 20, 20], None, "stl10/unlabeled+train"),
    ],
)
def test_stl10(split: Any, parts: Any, values: list[int], labels: Any, name: str, stl10: Path) -> None:
    images = open_images("stl10", size=96, split=split, parts=parts, cache_dir=stl10)
    assert images.pixels[:, 0, 0, 0].tolist() == values
    assert (None if images.labels is None else images.labels.tolist()) == labels
    assert images.classes == (() if labels is None else ("plane", "bird"))
    assert images.name == name


@pytest.mark.parametrize(
    ("size", "folder"),
    [(64, "imagenette2-160"), (160, "imagenette2-160"), (224, "imagenette2-320"), (336, "imagenette2")],
)
def test_imagenette_comes_in_the_smallest_resolution_that_suffices(size: int, folder: str, tmp_path: Path) -> None:
    for file in (
        "train/n02102040/1.JPEG",
        "train/n01440764/2.JPEG",
        "val/n02102040/3.JPEG",
        "val/n01440764/4.JPEG",
    ):
        (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).touch()
    listing = open_named("imagenette", size, "val", None, tmp_path)
    assert isinstance(listing, Listing)
    assert listing.root == tmp_path / folder
    assert listing.classes == ("tench", "English springer")
    assert listing.paths == ["val/n01440764/4.JPEG", "val/n02102040/3.JPEG"]
    assert listing.labels == [0, 1]
    assert listing.name == "imagenette/val"


@pytest.mark.parametrize("name", ["cifar10", "stl10", "imagenette", "fashion-mnist"])
def test_a_download_that_fails(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^source '{name}': torchvision cannot get or read it in {tmp_path}: "):
        open_named(name, 32, "train", None, tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "parts", "available"),
    [
        ("stl10", "train", ("test",), "train, unlabeled"),
        ("stl10", "train", (), "train, unlabeled"),
        ("stl10", "val", ("unlabeled",), "none"),
        ("cifar10", "train", ("train",), "none"),
        ("fashion-mnist-mini", "train", ("train",), "none"),
    ],
)
def test_parts_that_are_not_there(name: str, split: Any, parts: Any, available: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^parts \(.*\): source '{name}' has these for split '{split}': {available}$"):
        open_named(name, 32, split, parts, tmp_path)
