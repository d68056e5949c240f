"""The main job on packaged models and images: load, extract, measure, and draw. Needs no network."""

import time
from pathlib import Path

import torch

from . import hub
from .features import Features, extract
from .named import photographs
from .plots import comparison, curves, reconstruction
from .probe import knn, linear, pixel_features
from .registry import WEIGHTS
from .report import Report, table
from .restore import random_encoder, recipe_of, reconstruct
from .storage import save_text

SOURCE = "fashion-mnist-mini"


def demo(out: Path) -> None:
    """Measure every packaged model on the packaged slice of Fashion-MNIST, beside two baselines.

    Args:
        out: Folder for `scores.md` and the pictures.
    """
    began = time.monotonic()
    print(
        f"Features of {SOURCE}, none of whose images any model was trained on: 1,000 to fit, 1,000 to score."
    )
    rows: list[tuple[str, Report]] = []
    for weights in WEIGHTS:
        for label, encoder in {
            weights.name: hub.load(weights.name),
            f"{weights.name}, random": random_encoder(weights.name),
        }.items():
            rows += _scores(label, *(extract(encoder, SOURCE, split=split) for split in ("train", "val")))
    size = recipe_of(WEIGHTS[0].name).image_size
    rows += _scores(
        "raw pixels", *(pixel_features(SOURCE, size=size, split=split) for split in ("train", "val"))
    )
    text = table(rows)
    print(f"\n{text}\n")
    save_text(out / "scores.md", text + "\n")
    pictures = [comparison(rows, out / "scores.png")]
    for weights in WEIGHTS:
        pictures.append(curves(weights.directory, out / f"{weights.name}.curves.png"))
        if recipe_of(weights.name).method == "mae":
            images = list(photographs().values())
            pictures.append(reconstruction(*reconstruct(weights.name, images), out / f"{weights.name}.png"))
    print("\n".join(str(picture) for picture in pictures))
    print(f"{time.monotonic() - began:.0f} s on {torch.get_num_threads()} threads")


def _scores(label: str, train: Features, val: Features) -> list[tuple[str, Report]]:
    return [(label, linear(train, val)), (label, knn(train, val))]
