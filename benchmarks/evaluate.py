"""Measure encoders on a labelled source, beside the same encoders untrained and beside raw pixels.

    python benchmarks/evaluate.py simclr_resnet18 --data tiny-imagenet-200 --per-class 100 --out scores.json

All are fitted on the same training images and scored once on all validation images, or with `--held-out 25` on so many
other training images of each class: to choose between models, for which validation images must not serve. The JSON has
one entry for each line of the table and protocol.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from vision_ssl import Features, extract, load, open_images
from vision_ssl.data import ImageSet
from vision_ssl.device import native_bf16, pick_device
from vision_ssl.features import pixel_features
from vision_ssl.neighbours import knn
from vision_ssl.pretrain import commit_of_package, describe_machine
from vision_ssl.probe import linear
from vision_ssl.report import Report, paired_bootstrap, table
from vision_ssl.restore import random_encoder
from vision_ssl.storage import save_json


@dataclass
class Arguments:
    """What to measure.

    Attributes:
        models: Names or runs, as `vision_ssl.load` takes them.
        data: A labelled source with a training and a validation split.
        per_class: Training images of each class to fit on, drawn at random with seed 0; by default all.
        held_out: Score on so many other training images of each class; the validation split is then not opened.
        twins: Measure the same encoders untrained, too.
        pixels: Side at which raw pixels are the features of the baseline.
        device: Where the encoders compute.
        out: The JSON.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    data: str
    out: Path
    per_class: int | None = None
    held_out: int | None = None
    twins: bool = True
    pixels: int = 16
    device: str = "auto"


def main(arguments: Arguments) -> None:
    """Measure, print the table, and save the JSON."""
    device = pick_device(arguments.device)
    rows: list[tuple[str, Report]] = []
    for name in arguments.models:
        encoders = {name: load(name)} | ({f"{name}, untrained": random_encoder(name)} if arguments.twins else {})
        for label, encoder in encoders.items():
            train, val = splits(arguments, encoder.preprocess.size)
            fitted_on, scored_on = (features(encoder, images, device) for images in (train, val))
            rows += reports(label, fitted_on, scored_on, device)
    train, val = splits(arguments, arguments.pixels)
    fitted_on, scored_on = (pixel_features(images, size=arguments.pixels) for images in (train, val))
    rows += reports(label_of_pixels(arguments), fitted_on, scored_on, device)
    print(table(rows))
    linears = {label: report for label, report in rows if report.protocol == "linear"}
    first, *rivals = arguments.models
    pairs = [
        *((name, f"{name}, untrained") for name in arguments.models if arguments.twins),
        *((name, label_of_pixels(arguments)) for name in arguments.models),
        *((rival, first) for rival in rivals),
    ]
    differences = {f"{name} - {other}": str(paired_bootstrap(linears[name], linears[other])) for name, other in pairs}
    for pair, difference in differences.items():
        print(f"linear, {pair}: {difference}")
    save_json(
        arguments.out,
        {
            "data": arguments.data if not Path(arguments.data).exists() else Path(arguments.data).name,
            "scored_on": "validation images" if arguments.held_out is None else "held-out training images",
            "machine": describe_machine(device),
            "precision": "bf16" if native_bf16(device) else "fp32",
            "torch": torch.__version__,
            "commit": commit_of_package(),
            "scores": [entry(label, report) for label, report in rows],
            "differences": differences,
        },
    )


def label_of_pixels(arguments: Arguments) -> str:
    """What the table calls the baseline."""
    return f"raw pixels, {arguments.pixels} px"


def splits(arguments: Arguments, size: int) -> tuple[ImageSet, ImageSet]:
    """The images to fit on and those to score on."""
    train = open_images(arguments.data, size=size, require_labels=True)
    fitted = train if arguments.per_class is None else train.per_class(arguments.per_class)
    if arguments.held_out is None:
        return fitted, open_images(arguments.data, size=size, split="val", require_labels=True)
    if arguments.per_class is None:
        raise SystemExit("held_out: expected with per_class, which leaves images to hold out")
    more = train.per_class(arguments.per_class + arguments.held_out)  # of the same draw: it contains the others
    chosen = set(fitted.paths)
    return fitted, more.select([index for index, path in enumerate(more.paths) if path not in chosen])


def features(encoder: torch.nn.Module, images: ImageSet, device: torch.device) -> Features:
    """Features in bfloat16 arithmetic where the device has it, otherwise in float32."""
    with torch.autocast(device.type, torch.bfloat16) if native_bf16(device) else nullcontext():
        return extract(encoder, images, device=device)


def reports(label: str, train: Features, val: Features, device: torch.device) -> list[tuple[str, Report]]:
    """The protocols, each once."""
    return [(label, linear(train, val, device=device)), (label, knn(train, val)), (label, knn(train, val, k=5))]


def entry(label: str, report: Report) -> dict[str, Any]:
    """What a card keeps of a report."""
    return {
        "features": label,
        "protocol": report.protocol,
        "accuracy": round(report.accuracy, 2),
        "interval": [round(end, 2) for end in report.interval],
        "macro_f1": round(report.macro_f1, 4),
        "train_accuracy": None if report.train_accuracy is None else round(report.train_accuracy, 2),
        "n_train": report.n_train,
        "n_val": report.n_val,
        "settings": dict(report.settings),
        "seed": report.seed,
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments))
