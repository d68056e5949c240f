"""From files on disk to batches of two SimCLR views, from the second epoch on, against lightly's in a DataLoader.

Run it by `python -m benchmarks.bench_pipeline`. Ours reads the cache that the first epoch made and augments in two
threads; the peer has two worker processes, which stay from epoch to epoch. The files are crops of the packaged
photographs, JPEG of 64 px as in Tiny ImageNet.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]  # it ships no types

from benchmarks.bench_augment import BATCH, recipe
from benchmarks.bench_decode import write_crops
from benchmarks.timing import Comparison, record
from vision_ssl import open_images
from vision_ssl.augment import Draws

SIDE, IMAGES = 64, 2048


def comparison(root: Path, cache: Path, *, fast: bool) -> Comparison:
    """One epoch each, every batch as two float32 tensors."""
    settings = replace(recipe(SIDE), fast_views=fast)
    pixels = open_images(root, size=SIDE, cache_dir=cache).pixels
    whole = slice(0, BATCH)

    def ours() -> None:
        for step, rows in enumerate(torch.randperm(IMAGES).split(BATCH)):
            draws = Draws(step, rows=whole, total=BATCH, device=pixels.device)
            settings.augment(pixels.index_select(0, rows), draws)

    files = ImageFolder(root, transform=SimCLRTransform(input_size=SIDE))
    loader = DataLoader(files, BATCH, shuffle=True, num_workers=2, persistent_workers=True)

    def theirs() -> None:
        for (first, second), _ in loader:
            assert first.shape == second.shape == (BATCH, 3, SIDE, SIDE)

    kind = "fast" if fast else "exact"
    return Comparison(
        f"{IMAGES:,} JPEG files of {SIDE} px to two SimCLR views each, {kind}, an epoch after the first, 2 threads",
        ours,
        {"lightly in a DataLoader, 2 workers": theirs},
        {"lightly in a DataLoader, 2 workers": 10},
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        photographs.mkdir()
        write_crops(photographs / "all", SIDE, SIDE, IMAGES, 90)
        rows = [comparison(photographs, Path(folder) / "cache", fast=fast) for fast in (False, True)]
        record("pipeline", rows, rounds=5)
