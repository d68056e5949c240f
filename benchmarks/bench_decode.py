"""Speed of decoding JPEG files, from the disk to uint8 pixels, against Pillow.

The files are crops of the packaged photographs: 64 px as in Tiny ImageNet, 500 x 375 as in ImageNet. Before anything
is timed, both decoders must give the same pixels.

    python -m benchmarks.bench_decode
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import vision_ssl
from benchmarks.timing import Comparison, record
from vision_ssl import cache, decode

PHOTOGRAPHS = sorted((Path(vision_ssl.__file__).parent / "assets").glob("*.jpg"))
QUALITIES = (75, 90)
CACHED = 2000


def write_crops(folder: Path, width: int, height: int, count: int, quality: int) -> list[Path]:
    """Random crops of the photographs, 4:2:0 as cameras and most tools write them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    photographs = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    paths = [folder / f"{index:05}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        photograph = photographs[index % len(photographs)]
        scale = rng.uniform(0.4, 1) * min(photograph.width / width, photograph.height / height)
        left = rng.uniform(0, photograph.width - scale * width)
        top = rng.uniform(0, photograph.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        crop = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
        crop.save(path, quality=quality, subsampling="4:2:0")
    return paths


def pillow(path: Path) -> decode.Pixels:
    """Uint8 (H, W, 3), as most loaders have it."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def ours(path: Path) -> decode.Pixels:
    """Uint8 (H, W, 3), as the cache has it."""
    pixels = decode.read_jpeg(path)
    if pixels is None:
        raise SystemExit(f"{path} is left to Pillow: is simplejpeg installed?")
    return pixels


def without_the_extra(work: Callable[[], object]) -> Callable[[], object]:
    """The same work as it is done where simplejpeg is not installed."""

    def patched() -> object:
        with mock.patch.object(decode, "simplejpeg", None):
            return work()

    return patched


def decoding(paths: list[Path], work: str, least: float) -> Comparison:
    """Each file once, in one thread."""
    for path in paths:
        np.testing.assert_array_equal(ours(path), pillow(path))
    return Comparison(
        f"decode {work}",
        lambda: [ours(path) for path in paths],
        {"Pillow": lambda: [pillow(path) for path in paths]},
        {"Pillow": least},
    )


def squares(paths: list[Path], work: str) -> Comparison:
    """As far as the square of 64 px that the cache stores."""

    def decode_all() -> list[decode.Pixels]:
        return [decode.decode_file(path, 64) for path in paths]

    return Comparison(f"decode {work} to 64 px", decode_all, {"without simplejpeg": without_the_extra(decode_all)}, {})


def caching(paths: list[Path], work: str) -> Comparison:
    """The cache of a folder from nothing: files are listed, hashed, decoded in all threads and written."""
    root, names = paths[0].parent, [path.name for path in paths]

    def build() -> None:
        with tempfile.TemporaryDirectory() as directory:
            cache.files(root, names, 64, Path(directory))

    return Comparison(f"cache {work}", build, {"without simplejpeg": without_the_extra(build)}, {})


def main() -> None:
    """Time all rows."""
    comparisons = []
    with tempfile.TemporaryDirectory() as temporary:
        for quality in QUALITIES:
            folder = Path(temporary) / str(quality)
            folder.mkdir()
            small = write_crops(folder / "64", 64, 64, CACHED if quality == QUALITIES[0] else 100, quality)
            large = write_crops(folder / "500", 500, 375, 12, quality)
            comparisons += [
                decoding(small[:100], f"100 JPEG files of 64 x 64, quality {quality}, one thread", 4),
                decoding(large, f"12 JPEG files of 500 x 375, quality {quality}, one thread", 1.6),
            ]
            if quality == QUALITIES[0]:
                comparisons += [
                    squares(small[:100], f"100 JPEG files of 64 x 64, quality {quality}, one thread"),
                    squares(large, f"12 JPEG files of 500 x 375, quality {quality}, one thread"),
                    caching(small, f"{CACHED:,} JPEG files of 64 x 64, quality {quality}"),
                ]
        record("decode", comparisons)


if __name__ == "__main__":
    main()
