"""Make the packaged pictures of `vision_ssl/assets` again, byte for byte under the same Pillow.

    python benchmarks/make_assets.py FASHION_MNIST_DIR PHOTOGRAPHS_DIR

The first folder holds the four `*-ubyte.gz` files of Fashion-MNIST (Debian: `dataset-fashion-mnist`), the
second `chelsea.png`, `coffee.png` and `rocket.jpg` (`skimage/data` in the wheel of scikit-image).
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

ASSETS = Path(__file__).parent.parent / "vision_ssl" / "assets"
PER_CLASS = 100


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped idx file of bytes: two zeros, a type code, the number of axes, their lengths, data."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    lengths = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(lengths)


def class_rows(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Image.Image:
    """Put the first images of each class side by side, a row for each class."""
    rows = [np.hstack(images[labels == label][:PER_CLASS]) for label in range(10)]
    return Image.fromarray(np.vstack(rows))


def main(fashion_mnist: Path, photographs: Path) -> None:
    """Write the pictures."""
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images = read_idx(fashion_mnist / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(fashion_mnist / f"{prefix}-labels-idx1-ubyte.gz")
        class_rows(images, labels).save(ASSETS / f"fashion_mnist_mini_{split}.png", optimize=True)
    for name in ("chelsea.png", "coffee.png"):
        with Image.open(photographs / name) as image:
            image.convert("RGB").save(ASSETS / name.replace(".png", ".jpg"), quality=90)
    (ASSETS / "rocket.jpg").write_bytes((photographs / "rocket.jpg").read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
