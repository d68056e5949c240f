"""Two SimCLR views of 224 px from JPEG files of 500 x 375 as in ImageNet, on one thread, against lightly's transform.

Run it by `python -m benchmarks.bench_photographs`. Ours decodes to the square of 256 px that the cache keeps; this is
the first epoch, and later ones save it.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image

from benchmarks.bench_augment import recipe
from benchmarks.bench_decode import write_crops
from benchmarks.timing import Comparison, record
from vision_ssl.augment import Draws
from vision_ssl.decode import decode_file

KEPT, SIDE, FILES = 256, 224, 32


def comparison(paths: list[Path], *, fast: bool) -> Comparison:
    """Each file once, all views as two float32 batches."""
    settings, transform = replace(recipe(SIDE), fast_views=fast), SimCLRTransform(input_size=SIDE)

    def ours() -> object:
        pixels = torch.from_numpy(np.stack([decode_file(path, KEPT) for path in paths]))
        return settings.augment(pixels, Draws(0, rows=slice(None), total=FILES, device=pixels.device))

    def theirs() -> object:
        views = [transform(Image.open(path).convert("RGB")) for path in paths]
        return torch.stack([first for first, _ in views]), torch.stack([second for _, second in views])

    kind = "fast" if fast else "exact"
    return Comparison(
        f"{FILES} JPEG files of 500 x 375 to two SimCLR views of {SIDE} px each, {kind}, 1 thread",
        ours,
        {"lightly": theirs},
        {"lightly": 3},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = write_crops(Path(folder) / "photographs", 500, 375, FILES, 90)
        record("photographs", [comparison(files, fast=fast) for fast in (False, True)], rounds=5)
