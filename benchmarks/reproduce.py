"""Measure models under every protocol, and lay the figures beside those of two earlier studies.

    python benchmarks/reproduce.py --data tiny-imagenet-200 --device cuda --transfer cifar10 fashion-mnist --finetune 50

Features are extracted once for each model and source. Each model and source gets a JSON of its own, which is there as
soon as it is measured; `benchmarks/update_readme.py` makes the README's tables of them.
"""

import runpy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from vision_ssl import Features, Report, extract, finetune, load
from vision_ssl.clustering import cluster
from vision_ssl.data import Split
from vision_ssl.device import native_bf16, pick_device
from vision_ssl.features import images_for
from vision_ssl.fewshot import fewshot
from vision_ssl.hub import Encoder
from vision_ssl.linear_sgd import STUDY_B
from vision_ssl.neighbours import knn
from vision_ssl.pretrain import commit_of_package, describe_machine
from vision_ssl.probe import linear, linear_sgd, resubstitution
from vision_ssl.registry import WEIGHTS
from vision_ssl.retrieval import retrieval
from vision_ssl.storage import save_json

SPLITS: tuple[Split, ...] = ("train", "val")
RESULTS = Path(__file__).parent / "results" / "reproduce"


@dataclass
class Arguments:
    """What to measure.

    Attributes:
        data: A labelled source with a training and a validation split, such as Tiny ImageNet, an ImageNet-100 tree or
            `imagenette`.
        models: Names or runs, as `vision_ssl.load` takes them; by default all packaged ones.
        transfer: Further labelled sources, for a linear probe and kNN.
        seeds: How often what depends on a seed is measured; fine-tuning is once.
        finetune: Epochs to fine-tune each model for, on all classes of `data`; 0 for none.
        per_class: Training images of each class to fit on, drawn at random; by default all.
        subset: Of more classes than that, measure the first so many by name too.
        device: Where the encoders and SGD compute.
        out: Folder for the JSON.
    """

    data: str
    models: tuple[str, ...] = ()
    transfer: tuple[str, ...] = ()
    seeds: int = 3
    per_class: int | None = None
    finetune: int = 0
    subset: int = 100
    device: str = "auto"
    out: Path = RESULTS


def main(arguments: Arguments) -> None:
    """Measure, save the JSON, and print the tables."""
    for name in arguments.models or [weights.name for weights in WEIGHTS]:
        encoder = load(name)
        for source in (arguments.data, *arguments.transfer):
            print(f"{name} on {source}", flush=True)
            record = measure(name, encoder, source, arguments)
            out = arguments.out / f"{record['data']}.{record['model']['name']}.json"
            save_json(out, record)
            if source == arguments.data and arguments.finetune:
                record["scores"].append(fine_tuned(encoder, source, arguments))
                save_json(out, record)
    readme = runpy.run_path(str(Path(__file__).with_name("update_readme.py")))
    print(readme["reproduced_tables"](arguments.out))


def measure(name: str, encoder: Encoder, source: str, arguments: Arguments) -> dict[str, Any]:
    """Everything about one model on one source."""
    device = pick_device(arguments.device)
    train, val = features(encoder, source, device, arguments.per_class)
    chosen = [len(train.classes)]
    if source == arguments.data and len(train.classes) > arguments.subset:
        chosen.append(arguments.subset)
    scores = []
    for classes in chosen:
        parts = train.first_classes(classes), val.first_classes(classes)
        reports = transfer_reports(*parts, arguments.seeds, device)
        if source == arguments.data:
            reports += further_reports(*parts, arguments.seeds, device)
        scores += [{"classes": classes, **entry(group)} for group in reports]
    return {
        "data": Path(source).name,
        "model": describe_model(name, encoder, train.encoder),
        "machine": describe_machine(device),
        "precision": "bf16" if native_bf16(device) else "fp32",
        "torch": torch.__version__,
        "commit": commit_of_package(),
        "scores": scores,
    }


def features(encoder: Encoder, source: str, device: torch.device, per_class: int | None) -> tuple[Features, Features]:
    """Features of both splits, in bfloat16 arithmetic where the device has it."""
    train, val = (images_for(encoder, source, split=split, cache_dir=None, require_labels=True)[0] for split in SPLITS)
    if per_class is not None:
        train = train.per_class(per_class)
    with torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
        return extract(encoder, train, device=device), extract(encoder, val, device=device)


def transfer_reports(train: Features, val: Features, seeds: int, device: torch.device) -> list[list[Report]]:
    """A report of each protocol for each seed; kNN depends on none."""
    return [[linear(train, val, device=device, seed=seed) for seed in range(seeds)], [knn(train, val)]]


def further_reports(train: Features, val: Features, seeds: int, device: torch.device) -> list[list[Report]]:
    """What else is measured of the data that everything is measured of; study A's protocol last."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resubstitution")  # the tables say what it is
        return [
            [linear_sgd(train, val, probe=STUDY_B, device=device, seed=seed) for seed in range(seeds)],
            [knn(train, val, k=5)],
            [knn(train, val, k=10, temperature=None)],
            [knn(train, val, k=5, temperature=None, metric="euclidean")],
            [fewshot(train, val, protocol="fewshot-5")],
            [retrieval(train, val)],
            [cluster(val)],
            [resubstitution(val, device=device)],
        ]


def fine_tuned(encoder: Encoder, source: str, arguments: Arguments) -> dict[str, Any]:
    """The entry of fine-tuning, on all classes."""
    device = pick_device(arguments.device)
    report = finetune(encoder, train=source, val=source, device=device, epochs=arguments.finetune)
    return {"classes": len(report.per_class), **entry([report])}


def entry(reports: list[Report]) -> dict[str, Any]:
    """Reports of one protocol, whose figures are lists with a value for each seed."""
    first = reports[0]
    return {
        "protocol": first.protocol,
        "accuracy": [round(report.accuracy, 2) for report in reports],
        "interval": [round(end, 2) for end in first.interval],
        "macro_f1": [round(report.macro_f1, 4) for report in reports],
        "train_accuracy": [round(report.train_accuracy, 2) for report in reports if report.train_accuracy is not None],
        "further": {name: [round(report.scores[name], 4) for report in reports] for name in first.scores},
        "n_train": first.n_train,
        "n_val": first.n_val,
        "seeds": [report.seed for report in reports],
        "settings": [dict(report.settings) for report in reports],
    }


def describe_model(name: str, encoder: Encoder, architecture: str) -> dict[str, Any]:
    """What the tables say of a model; None where its card is silent, as that of foreign weights may be."""
    training = encoder.card.get("training", {})
    return {
        "name": Path(name).name,
        "architecture": architecture,
        "image_size": encoder.preprocess.size,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "method": encoder.card.get("method"),
        "pretrained_on": encoder.card.get("data", {}).get("name"),
        "epochs": training.get("epochs"),
        "minutes": training.get("minutes"),
        "hardware": training.get("hardware"),
        "origin": encoder.card.get("origin"),
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments))
