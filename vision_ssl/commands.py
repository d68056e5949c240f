"""The commands but `train` and those of `extra`, a function each, which imports what it needs when it runs."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from .options import FineTuning, Protocol
from .registry import UPSTREAM, WEIGHTS, find

if TYPE_CHECKING:
    from .recipes import MAE
    from .report import Report

Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
SourcePath = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]


def list_command() -> None:
    """Show the models: our own, then those that are downloaded when they are first used."""
    rows = [("name", "linear", "kNN", "")]
    for weights in (*WEIGHTS, *UPSTREAM):
        scores = {score["protocol"]: f"{score['accuracy']:.1f} %" for score in weights.own_scores}
        rows.append((weights.name, scores.get("linear", "-"), scores.get("knn-20", "-"), weights.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def info_command(name: Name) -> None:
    """Show the card of a model: what it was trained on, how, and its measured scores.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
    """
    known = find(name)
    if known is not None and (known.is_local or known.facts):
        card = known.card
    else:
        from .hub import read_card

        card = read_card(name)
    print(json.dumps(card, indent=2, ensure_ascii=False))


def extract_command(
    name: Name,
    source: SourcePath,
    /,
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    split: Literal["train", "val"] = "train",
    pooling: Literal["avg", "token", "both"] = "avg",
    layers: int = 1,
    batch_size: int | None = None,
    device: str = "auto",
) -> None:
    """Write the features of images to a safetensors file, with labels and paths where there are any.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
        source: A folder of images, a known layout, or a torchvision name such as `cifar10`.
        out: Where the features go.
        split: Which part of a source that has several.
        pooling: `avg`, or a ViT's class `token`, or `both`.
        layers: How many of a ViT's last layers are averaged.
        batch_size: Images at a time; by default 256, and on a CPU 32 of 64 px or 8 of 224 px.
        device: `auto`, `cpu`, `cuda`, ...
    """
    from .device import pick_device
    from .features import extract
    from .restore import load

    tokens: dict[str, Any] = {"pooling": pooling, "layers": layers}
    features = extract(load(name), source, split=split, batch_size=batch_size, device=pick_device(device), **tokens)
    features.save(out)
    print(f"{out}: {len(features):,} x {features.features.shape[1]} features")


def probe_command(
    name: Name,
    /,
    *,
    train: str | None = None,
    val: str | None = None,
    protocol: Protocol = "linear",
    pooling: Literal["avg", "token", "both", "choose"] = "avg",
    layers: int = 1,
    classes: int | None = None,
    every_checkpoint: bool = False,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Measure frozen features, by default with a linear classifier; print accuracy, macro F1 and what else there is.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
        train: Labelled images to fit on; of a source with several splits, its training split.
        val: Labelled images to score on; of a source with several splits, its validation split.
        protocol: `linear` (logistic regression), `linear-sgd`, `linear-sgd-study-b` (the settings of study B),
            `linear-sgd-mae` and `linear-sgd-simclr` (those of the papers, on random crops), `attentive` (learned
            attention to the tokens), `knn` (20 neighbours), `fewshot-5` (so many labels a class, over 20 draws) and
            the like, `retrieval`, `cluster`, or `resubstitution`, which scores on the images it was fitted on.
        pooling: `avg`, or a ViT's class `token`, or `both`; `choose` finds the best on held-out training images.
        layers: How many of a ViT's last layers are averaged.
        classes: Only the first so many classes by name, such as 100 of the 200 of Tiny ImageNet.
        every_checkpoint: Measure each encoder that the run NAME kept (`train --keep-epochs`), into `probe_curve.csv`.
        out: Also write the report there, as JSON; of every checkpoint, the table and its picture.
        device: `auto`, `cpu`, `cuda`, ...
        seed: Of the split that chooses a setting, and of SGD.
    """
    from .device import pick_device

    options: dict[str, Any] = {"train": train, "val": val, "protocol": protocol, "classes": classes, "seed": seed}
    options |= {"pooling": pooling, "layers": layers, "device": pick_device(device)}
    if every_checkpoint:
        from .curve import probe_curve

        print(*probe_curve(name, out=out, **options), sep="\n")
    else:
        from .probe import evaluate
        from .restore import load

        _show(evaluate(load(name), **options), out)


def knn_command(
    name: Name,
    /,
    *,
    train: str,
    val: str | None = None,
    k: tuple[int, ...] = (20,),
    unweighted: bool = False,
    metric: Literal["cosine", "euclidean"] = "cosine",
    classes: int | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    device: str = "auto",
) -> None:
    """Classify by the nearest neighbours in frozen features; print accuracy and macro F1.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
        train: Labelled images to find neighbours among.
        val: Labelled images to score on; without them, each training image is scored by the others.
        k: Neighbours that vote; of several, such as 1 5 10 20 200, all are measured by one search.
        unweighted: Count their votes alike; by default nearer ones weigh more.
        metric: By which they are near; `euclidean` needs unweighted votes.
        classes: Only the first so many classes by name, such as 100 of the 200 of Tiny ImageNet.
        out: Also write the report there, as JSON; of several k, each with its protocol in the name.
        device: `auto`, `cpu`, `cuda`, ...
    """
    from .device import pick_device
    from .features import extract, images_for
    from .leakage import warn_of_twins
    from .neighbours import knn_sweep
    from .restore import load

    encoder = load(name)
    votes: dict[str, Any] = {"metric": metric} | ({"temperature": None} if unweighted else {})
    options: dict[str, Any] = {"classes": classes, "require_labels": True}
    splits = [images_for(encoder, train, split="train", **options)[0]]
    if val is not None:
        splits.append(images_for(encoder, val, split="val", **options)[0])
        warn_of_twins(*splits)
    features = [extract(encoder, images, device=pick_device(device)) for images in splits]
    for report in knn_sweep(*features, ks=k, **votes):
        _show(report, out and (out if len(k) == 1 else out.with_stem(f"{out.stem}-{report.protocol}")))


def leaks_command(*, train: str, val: str, name: str | None = None, count: int = 20) -> None:
    """Find images that are in both splits: equal pixels, and with an encoder the most similar pairs.

    Args:
        train: Images; of a source with several splits, its training split.
        val: Images; of a source with several splits, its validation split.
        name: An encoder to find similar pairs by: a model, the directory of a run, a folder of weights, ...
        count: How many similar pairs.
    """
    from .data import open_images
    from .features import extract
    from .leakage import exact_twins, near_twins
    from .restore import load

    encoder = None if name is None else load(name)
    size = 64 if encoder is None else encoder.preprocess.size
    twins = exact_twins(open_images(train, size=size), open_images(val, size=size, split="val"))
    print(f"{len(twins):,} pairs of equal pixels at {size} px")
    for ours, theirs in twins:
        print(ours, theirs, sep="  ")
    if encoder is not None:
        print("the most similar pairs, with their cosine")
        near = near_twins(extract(encoder, train), extract(encoder, val, split="val"), count=count)
        for ours, theirs, cosine in near:
            print(ours, theirs, f"{cosine:.4f}", sep="  ")


def finetune_command(
    name: Name,
    /,
    *,
    train: str,
    val: str,
    preset: str = "mae",
    settings: FineTuning = FineTuning(),  # noqa: B008  # frozen
    classes: int | None = None,
    time_limit: float | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Train an encoder end to end with a new head; print accuracy and macro F1.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
        train: Labelled images to train on; of a source with several splits, its training split.
        val: Labelled images to score on, once; of a source with several splits, its validation split.
        preset: Named settings to start from: `mae`, or `small-data` for some thousand images or fewer.
        settings: How it is trained, by default as the preset says.
        classes: Only the first so many classes by name, such as 100 of the 200 of Tiny ImageNet.
        time_limit: Minutes after which no further epoch begins.
        out: Also write the report there, as JSON.
        device: `auto`, `cpu`, `cuda`, ...
        seed: Of the head, the order of the images, and the views.
    """
    FineTuning.of(preset)  # refuses an unknown one; of a known one, `settings` already has the values
    from .device import pick_device
    from .finetuning import finetune

    options: dict[str, Any] = {"classes": classes, "time_limit": time_limit, "device": pick_device(device)}
    _show(finetune(name, train=train, val=val, seed=seed, **options, **vars(settings)), out)


def _show(report: "Report", out: Path | None) -> None:
    print(report)
    if out is not None:
        report.save(out)


def reconstruct_command(
    name: Name,
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE ...")],
    /,
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    mask_ratio: float | None = None,
    seed: int = 0,
) -> None:
    """Draw images as MAE is shown them, and as it fills in what was removed.

    Args:
        name: An MAE model, or the directory of an MAE run.
        images: Image files.
        out: Where the picture goes.
        mask_ratio: Fraction removed; by default as in training.
        seed: Of the mask.
    """
    from PIL import Image

    from .plots import reconstruction
    from .restore import recipe_of, reconstruct

    with ExitStack() as files:
        pictures = [files.enter_context(Image.open(path)) for path in images]
        images_of = reconstruct(name, pictures, mask_ratio=mask_ratio, seed=seed)
    print(reconstruction(*images_of, out, norm_pix=cast("MAE", recipe_of(name)).norm_pix))


def plot_command(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Draw the curves of a run: loss, learning rate, and kNN accuracy where labels exist.

    Args:
        run: The directory of a run.
        out: Where the picture goes; by default `curves.png` in the run.
    """
    from .plots import curves

    print(curves(run, out or run / "curves.png"))


def demo_command(out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")) -> None:
    """Measure the packaged models on packaged images, and draw what they see. Needs no network.

    Args:
        out: Folder for the table and the pictures.
    """
    from .demo import demo

    demo(out)
