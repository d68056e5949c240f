import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vision_ssl.data import ImageSet, Split, open_images
from vision_ssl.errors import DataError
from vision_ssl.features import Features
from vision_ssl.leakage import exact_twins, near_twins, warn_of_twins

SPLITS: tuple[Split, ...] = ("train", "val")


def images(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 20, 20), dtype=torch.uint8, generator=generator)
    return open_images(pixels, size=20)


def test_equal_pixels_are_found_whatever_the_files_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, names in (("train", "abc"), ("val", "xyz")):
        (tmp_path / split / "class").mkdir(parents=True)
        for name in names:
            pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(tmp_path / split / "class" / f"{name}.png")
    with Image.open(tmp_path / "train" / "class" / "b.png") as image:
        image.save(tmp_path / "val" / "class" / "other.bmp")
        image.save(tmp_path / "train" / "class" / "again.tiff")
    train, val = (open_images(tmp_path, size=8, split=split, cache_dir=tmp_path / "cache") for split in SPLITS)
    found = {tuple(Path(path).name for path in pair) for pair in exact_twins(train, val)}
    assert found == {("b.png", "other.bmp"), ("again.tiff", "other.bmp")}


def test_one_value_apart_is_no_twin() -> None:
    train, val = images(5, 0), images(6, 1)
    assert exact_twins(train, val) == []
    pixels = val.pixels.clone()
    pixels[3] = train.pixels[2]
    assert exact_twins(train, replace(val, pixels=pixels)) == [("2", "3")]
    for row in (3, 10):  # 10 is the middle row
        pixels[3, 2, row, 3] ^= 1
        assert exact_twins(train, replace(val, pixels=pixels)) == []
        pixels[3, 2, row, 3] ^= 1
    pixels[1], pixels[4, :, 10] = pixels[3], pixels[3, :, 10]
    assert exact_twins(train, replace(val, pixels=pixels)) == [("2", "1"), ("2", "3")]


def test_the_same_images_are_no_leak() -> None:
    train = images(5, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_twins(train, train)


def test_other_shapes_are_refused() -> None:
    small = open_images(torch.zeros(2, 3, 18, 18, dtype=torch.uint8), size=18)
    message = r"val: images are \(3, 18, 18\), expected \(3, 20, 20\) as in train$"
    with pytest.raises(DataError, match=message):
        exact_twins(images(2, 0), small)


def features(rows: torch.Tensor, prefix: str) -> Features:
    paths = tuple(f"{prefix}{number}" for number in range(len(rows)))
    return Features(rows, None, (), paths, digest=prefix)


def test_most_similar_pairs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(30, 6, generator=generator)
    val = torch.randn(25, 6, generator=generator)
    val[7], val[20] = 3 * train[4], train[11] + 0.01
    cosine = torch.nn.functional.cosine_similarity(val[:, None], train[None], dim=2)
    for block in (1, 100, 1 << 20):
        monkeypatch.setattr("vision_ssl.neighbours.BLOCK", block)
        pairs = near_twins(features(train, "t"), features(val, "v"), count=5)
        assert [pair[:2] for pair in pairs[:2]] == [("t4", "v7"), ("t11", "v20")]
        assert [pair[2] for pair in pairs] == pytest.approx(cosine.max(dim=1).values.sort(descending=True).values[:5])
