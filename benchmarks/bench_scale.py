"""Time and peak memory against the number of images: building the cache, extracting features, kNN.

Every stage of every size is a process of its own, so that its peak memory is its own. The peak counts the pages of
memory-mapped files too, which the system takes back when it needs them: of extraction, 12 kB for each image.

    python -m benchmarks.bench_scale
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import vision_ssl
from benchmarks.timing import write
from vision_ssl.data import Preprocess, channel_statistics
from vision_ssl.features import Features, extract
from vision_ssl.neighbours import knn

SIZES = (1_000, 10_000, 100_000)
STAGES = ("cache", "extract", "knn")
CLASSES, QUERIES = 100, 1_000
SIDE, DIM = 64, 256


def write_images(folder: Path, count: int) -> None:
    """JPEG files of 64 px in folders of classes, no two of them alike."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"{label:03}").mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        picture = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index % CLASSES:03}" / f"{index:06}.jpg")


def patches() -> nn.Sequential:
    """An encoder of one layer, so that what is seen is the cost of everything but the encoder."""
    encoder = nn.Sequential(nn.Conv2d(3, DIM, 16, stride=16), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.preprocess = Preprocess(SIDE, *channel_statistics(3))  # type: ignore[assignment]  # no module
    return encoder.eval()


def peak() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def stage(name: str, folder: Path) -> dict[str, float]:
    """Do one stage, after what it needs has been imported and loaded; seconds, and MB before and at the peak."""
    cache, kept = folder / "cache", folder / "features.safetensors"
    if name == "cache":
        before, began = peak(), time.perf_counter()
        vision_ssl.open_images(folder / "images", size=SIDE, cache_dir=cache)
        seconds = time.perf_counter() - began
    elif name == "extract":
        encoder = patches()
        encoder(torch.zeros(256, 3, SIDE, SIDE))
        before, began = peak(), time.perf_counter()
        features = extract(encoder, folder / "images", cache_dir=cache)
        seconds = time.perf_counter() - began
        features.save(kept)
    else:
        features = Features.load(kept)
        features.features.sum()  # reads the file, which loading only maps
        queries = features.select(torch.arange(QUERIES))
        before, began = peak(), time.perf_counter()
        knn(features, queries)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "before_mb": before, "peak_mb": peak()}


def measure(folder: Path, count: int) -> list[dict[str, Any]]:
    """The stages, one process each, for a folder of `count` images."""
    write_images(folder / "images", count)
    rows: list[dict[str, Any]] = []
    for name in STAGES:
        command = [sys.executable, "-m", "benchmarks.bench_scale", "--stage", name, "--folder", str(folder)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        per_image = 1e6 * result["seconds"] / count
        figures = {key: float(f"{value:.4g}") for key, value in {**result, "us_per_image": per_image}.items()}
        rows.append({"stage": name, "images": count, **figures})
        print(
            f"{name}, {count:,} images: {result['seconds']:.3g} s, {per_image:.4g} us per image, "
            f"peak {result['peak_mb']:,.0f} MB ({result['before_mb']:,.0f} MB before)",
            flush=True,
        )
    return rows


def main() -> None:
    """All sizes, or one stage for a folder that is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(stage(arguments.stage, arguments.folder)))
        return
    rows = []
    for count in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), count)
    for name in STAGES:
        costs = [row["us_per_image"] for row in rows if row["stage"] == name]
        print(f"{name}: the cost of an image from the smallest to the largest size is {costs[-1] / costs[0]:.2f}x")
    write("scale", rows, rounds=1)


if __name__ == "__main__":
    main()
