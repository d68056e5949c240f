import json
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision_ssl import extract, finetune, hub, load
from vision_ssl.clustering import cluster
from vision_ssl.encoders import resolve_encoder
from vision_ssl.fewshot import fewshot
from vision_ssl.linear_sgd import STUDY_B
from vision_ssl.neighbours import knn
from vision_ssl.probe import linear, linear_sgd, resubstitution
from vision_ssl.report import Report
from vision_ssl.retrieval import retrieval

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CLASSES = ("n03", "n01", "n02")  # as in wnids.txt, which is not sorted


def write_images(folder: Path, name: str, colour: int, count: int, seed: int) -> list[str]:
    """Noise in which one channel is darker."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.normal((60, 120, 180), 40, size=(16, 16, 3)) - 50 * (np.arange(3) == colour)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}_{number}.png")
    return [f"{name}_{number}.png" for number in range(count)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny ImageNet in small: three classes of ten training and four validation images."""
    root = tmp_path_factory.mktemp("data") / "tiny-imagenet-3"
    annotations = []
    for colour, name in enumerate(CLASSES):
        write_images(root / "train" / name / "images", name, colour, 10, seed=colour)
        for file in write_images(root / "val" / "images", name, colour, 4, seed=9 + colour):
            annotations.append(f"{file}\t{name}\t0\t0\t9\t9")
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    (root / "val" / "val_annotations.txt").write_text("\n".join(annotations))
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "pictures"
    for colour, name in enumerate(("red", "green")):
        write_images(root / "train" / name, name, colour, 10, seed=20 + colour)
        write_images(root / "val" / name, name, colour, 5, seed=30 + colour)
    return root


ORIGIN = {"name": "earlier", "epochs": 2.0, "minutes": 4.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a run of three epochs after two others, as its card says."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    spec = resolve_encoder("vit_tiny", image_size=16)
    torch.manual_seed(0)
    training = {"epochs": 3.0, "minutes": 4.5, "hardware": "1 x NVIDIA T4"}
    card = {"method": "mae", "data": {"name": "photos"}, "training": training, "origin": ORIGIN}
    hub.save(folder, spec.build(), spec, card=card)
    return folder


@pytest.fixture(scope="module")
def results(tree: Path, pictures: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script wrote."""
    out = tmp_path_factory.mktemp("results")
    script = runpy.run_path(str(BENCHMARKS / "reproduce.py"))
    arguments: dict[str, Any] = {"models": (str(weights),), "transfer": (str(pictures),), "seeds": 2, "subset": 2}
    script["main"](script["Arguments"](data=str(tree), out=out, device="cpu", **arguments))
    return out


def test_finetuning_where_it_is_asked_for(pictures: Path, weights: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(BENCHMARKS / "reproduce.py"))
    script["main"].__globals__["finetune"] = partial(finetune, batch_size=10)  # there are 20 images
    arguments: dict[str, Any] = {"models": (str(weights),), "seeds": 1, "finetune": 2, "device": "cpu"}
    script["main"](script["Arguments"](data=str(pictures), out=tmp_path, **arguments))
    *others, last = read(tmp_path, "pictures.tiny")["scores"]
    assert len(others) == 10
    assert (last["protocol"], last["classes"], last["seeds"], last["n_train"]) == ("finetune", 2, [0], 20)
    assert last["settings"][0]["epochs"] == 2


def read(results: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return record


def figures(reports: list[Report]) -> dict[str, Any]:
    return {
        "protocol": reports[0].protocol,
        "accuracy": pytest.approx([report.accuracy for report in reports], abs=0.005),
        "macro_f1": pytest.approx([report.macro_f1 for report in reports], abs=0.00005),
        "train_accuracy": [
            pytest.approx(report.train_accuracy, abs=0.005) for report in reports if report.train_accuracy is not None
        ],
        "seeds": [report.seed for report in reports],
    }


@pytest.mark.filterwarnings("ignore:resubstitution")
def test_every_protocol_on_all_classes_and_on_the_first(results: Path, tree: Path, weights: Path) -> None:
    encoder = load(weights)
    whole = [extract(encoder, tree, split="train"), extract(encoder, tree, split="val")]
    first = [part.first_classes(2) for part in whole]
    assert first[0].classes == ("n01", "n02")
    expected = []
    for train, val in (whole, first):
        reports = [
            [linear(train, val, seed=seed) for seed in (0, 1)],
            [knn(train, val)],
            [linear_sgd(train, val, probe=STUDY_B, seed=seed) for seed in (0, 1)],
            [knn(train, val, k=5)],
            [knn(train, val, k=10, temperature=None)],
            [knn(train, val, k=5, temperature=None, metric="euclidean")],
            [fewshot(train, val, protocol="fewshot-5")],
            [retrieval(train, val)],
            [cluster(val)],
            [resubstitution(val)],
        ]
        expected += [{"classes": len(train.classes), **figures(group)} for group in reports]
    scores = read(results, "tiny-imagenet-3.tiny")["scores"]
    kept = expected[0].keys()
    assert [{name: score[name] for name in kept} for score in scores] == expected
    assert scores[-1]["protocol"] == "resubstitution"


def test_transfer_is_a_linear_probe_and_knn(results: Path) -> None:
    record = read(results, "pictures.tiny")
    assert record["data"] == "pictures"
    assert [(score["classes"], score["protocol"]) for score in record["scores"]] == [(2, "linear"), (2, "knn-20")]


def test_the_card_tells_what_a_model_cost(results: Path) -> None:
    assert read(results, "tiny-imagenet-3.tiny")["model"] == {
        "name": "tiny",
        "architecture": "vit_tiny_patch16_224",
        "image_size": 16,
        "parameters": sum(p.numel() for p in resolve_encoder("vit_tiny", image_size=16).build().parameters()),
        "method": "mae",
        "pretrained_on": "photos",
        "epochs": 3.0,
        "minutes": 4.5,
        "hardware": "1 x NVIDIA T4",
        "origin": ORIGIN,
    }


def test_tables(results: Path) -> None:
    tables = runpy.run_path(str(BENCHMARKS / "update_readme.py"))["reproduced_tables"]
    costs, scores, *_, why = tables(results).split("\n\n")
    assert costs.splitlines()[2:] == [
        "| `tiny` | vit_tiny_patch16_224 | 16 px | 5.4 M | 2 + 3 | 90 s | 4.0 min + 4.5 min | 1 x NVIDIA T4 |"
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in scores.splitlines()]
    assert [row[:3] for row in rows[2:]] == [
        ["`tiny`", "pictures", "2"],
        ["`tiny`", "tiny-imagenet-3", "3"],
        ["`tiny`", "tiny-imagenet-3", "2"],
    ]
    cells = dict(zip(rows[0][3:], rows[3][3:], strict=False))
    found = {score["protocol"]: score for score in read(results, "tiny-imagenet-3.tiny")["scores"][:7]}
    assert cells["kNN, k = 20 (%)"] == f"{found['knn-20']['accuracy'][0]:.1f}"
    linears = found["linear"]["train_accuracy"]
    assert cells["linear: training (%)"] == f"{np.mean(linears):.1f} ± {np.std(linears, ddof=1):.1f}"
    assert rows[2][-1] == cells["fine-tuned (%)"] == "-"  # not measured
    assert why.startswith("These figures are of other data")


def test_the_studies_are_quoted_as_they_are(tmp_path: Path) -> None:
    """Their own figures, which the tables show before anything of ours is measured."""
    tables = runpy.run_path(str(BENCHMARKS / "update_readme.py"))["reproduced_tables"]
    quoted = tables(tmp_path).split("\n\n")[-2].splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in quoted] == [
        ["SimCLR (A)", "ResNet-18", "60 px", "-", "35", "-", "resubstitution", "86.7", "-", "0.864"],
        ["MAE (A)", "ResNet-18", "60 px", "-", "4", "-", "resubstitution", "85.4", "-", "0.857"],
        *[
            ["MAE (B)", f"ViT-{size}", "224 px", f"{parameters} M", "100", time, "linear-sgd-study-b", *accuracies, "-"]
            for size, parameters, time, accuracies in (
                ("Small", 21.7, "2 min 57 s", ("39.7", "33.7")),
                ("Base", 86.6, "4 min 34 s", ("41.9", "34.0")),
            )
        ],
        [
            "SimCLR (B)",
            "ResNet-50",
            "224 px",
            "23.5 M",
            "100",
            "12 min 02 s",
            "linear-sgd-study-b",
            "63.9",
            "45.7",
            "-",
        ],
    ]
