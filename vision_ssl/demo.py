"""The main job on packaged models and images: load, extract, measure, and draw. Needs no network."""

import time
from pathlib import Path

import torch

from . import hub
from .data import Split, photographs
from .features import Features, extract, pixel_features
from .neighbours import knn
from .plots import comparison, curves, reconstruction
from .probe import linear
from .recipes import MAE
from .registry import WEIGHTS, Weights
from .report import Report, paired_bootstrap, table
from .restore import random_encoder, recipe_of, reconstruct
from .storage import save_text

SOURCE = "fashion-mnist-mini"
MODELS = tuple(weights for weights in WEIGHTS if weights.is_packaged)
_SPLITS: tuple[Split, Split] = ("train", "val")


def demo(out: Path) -> None:
    """Measure every packaged model on the packaged slice of Fashion-MNIST, beside two baselines.

    Args:
        out: Folder for `scores.md` and the pictures.
    """
    began = time.monotonic()
    print(f"{SOURCE}: 1,000 images to fit, 1,000 to score; no model has seen any of them.\n", flush=True)
    rows: list[tuple[str, Report]] = []
    for weights in MODELS:
        encoders = {weights.name: hub.load(weights.name), _untrained(weights): random_encoder(weights.name)}
        for label, encoder in encoders.items():
            rows += _scores(label, *(extract(encoder, SOURCE, split=split) for split in _SPLITS))
    rows += _scores("raw pixels", *(pixel_features(SOURCE, size=28, split=split) for split in _SPLITS))
    linears = {label: report for label, report in rows if report.protocol == "linear"}
    gains = [
        f"{weights.name} gains {paired_bootstrap(linears[weights.name], linears[_untrained(weights)])} by its training."
        for weights in MODELS
    ]
    text = "\n".join([table(rows), "", *gains])
    print(text)
    save_text(out / "scores.md", text + "\n")
    pictures = [comparison(rows, out / "scores.png")]
    for weights in MODELS:
        pictures.append(curves(weights.directory, out / f"{weights.name}-curves.png"))
        recipe = recipe_of(weights.name)
        if isinstance(recipe, MAE):
            images = reconstruct(weights.name, list(photographs().values()))
            pictures.append(reconstruction(*images, out / f"{weights.name}.png", norm_pix=recipe.norm_pix))
    print(
        "\n".join(["", *map(str, pictures), f"{time.monotonic() - began:.0f} s on {torch.get_num_threads()} threads"])
    )


def _untrained(weights: Weights) -> str:
    return f"{weights.name}, untrained"


def _scores(label: str, train: Features, val: Features) -> list[tuple[str, Report]]:
    return [(label, linear(train, val)), (label, knn(train, val))]
