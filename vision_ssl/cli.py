"""The command line. Its options are the recipes' fields; torch is imported by the commands that need it."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from .errors import RecipeError, VisionSSLError
from .options import RunOptions
from .presets import PRESETS
from .recipes import MAE, METHODS, Recipe, SimCLR
from .registry import UPSTREAM, WEIGHTS, find

if TYPE_CHECKING:
    from .report import Report

Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
SourcePath = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]


def list_command() -> None:
    """Show the models: the packaged ones, then those that are downloaded when they are first used."""
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
    batch_size: int = 256,
    device: str = "auto",
) -> None:
    """Write the features of images to a safetensors file, with labels and paths where there are any.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
        source: A folder of images, a known layout, or a torchvision name such as `cifar10`.
        out: Where the features go.
        split: Which part of a source that has several.
        batch_size: Images at a time.
        device: `auto`, `cpu`, `cuda`, ...
    """
    from .device import pick_device
    from .features import extract
    from .hub import load

    features = extract(load(name), source, split=split, batch_size=batch_size, device=pick_device(device))
    features.save(out)
    print(f"{out}: {len(features):,} x {features.features.shape[1]} features")


def probe_command(
    name: Name,
    /,
    *,
    train: str,
    val: str,
    protocol: Literal["linear", "resubstitution"] = "linear",
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Fit a linear classifier on frozen features; print accuracy and macro F1.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
        train: Labelled images to fit on; of a source with several splits, its training split.
        val: Labelled images to score on; of a source with several splits, its validation split.
        protocol: `linear` (held out), or `resubstitution`, which scores on the images it was fitted on.
        out: Also write the report there, as JSON.
        device: `auto`, `cpu`, `cuda`, ...
        seed: Of the split that chooses the regularisation.
    """
    from .device import pick_device
    from .hub import load
    from .probe import evaluate

    encoder, where = load(name), pick_device(device)
    _show(evaluate(encoder, train=train, val=val, protocol=protocol, device=where, seed=seed), out)


def knn_command(
    name: Name,
    /,
    *,
    train: str,
    val: str,
    k: int = 20,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    device: str = "auto",
) -> None:
    """Classify by the nearest neighbours in frozen features; print accuracy and macro F1.

    Args:
        name: A model, the directory of a run, a folder of weights, or `hf:owner/repo`.
        train: Labelled images to find neighbours among.
        val: Labelled images to score on.
        k: Neighbours that vote.
        out: Also write the report there, as JSON.
        device: `auto`, `cpu`, `cuda`, ...
    """
    from .device import pick_device
    from .hub import load
    from .probe import evaluate

    encoder, where = load(name), pick_device(device)
    _show(evaluate(encoder, train=train, val=val, protocol="knn", k=k, device=where), out)


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
    from .restore import reconstruct

    with ExitStack() as files:
        pictures = [files.enter_context(Image.open(path)) for path in images]
        print(reconstruction(*reconstruct(name, pictures, mask_ratio=mask_ratio, seed=seed), out))


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


def push_command(
    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None,
    repo: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="REPO")] = None,
    /,
    *,
    zoo: str | None = None,
    private: tyro.conf.FlagCreatePairsOff[bool] = False,
    tag: str | None = None,
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> None:
    """Publish a run on the Hugging Face Hub: weights, and a model card made from them, in one commit.

    Args:
        run: The directory of a run, or a folder of weights.
        repo: `owner/name`; made if it is not there.
        zoo: Instead of a run, publish every packaged model under this owner.
        private: Make the repository private.
        tag: A name for this commit, which never changes its meaning.
        dry_run: Show what would be sent, and send nothing.
    """
    from .extra.push import push, push_zoo

    if zoo is not None and run is None:
        for result in push_zoo(zoo, private=private, tag=tag, dry_run=dry_run):
            print(result)
    elif zoo is None and run is not None and repo is not None:
        print(push(run, repo, private=private, tag=tag, dry_run=dry_run))
    else:
        raise RecipeError("push got neither RUN and REPO nor --zoo OWNER alone: expected one of the two")


def demo_command(out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")) -> None:
    """Measure the packaged models on packaged images, and draw what they see. Needs no network.

    Args:
        out: Folder for the table and the pictures.
    """
    from .demo import demo

    demo(out)


@dataclass(kw_only=True)
class _Training:
    """What every training command takes beside its recipe.

    Attributes:
        source: A folder of images, a known layout, or a torchvision name such as `cifar10`.
        preset: Named settings to start from; the options below change single ones.
    """

    source: SourcePath
    preset: str
    options: RunOptions


@dataclass(kw_only=True)
class _TrainSimCLR(_Training):
    """Pretrain an encoder with SimCLR."""

    recipe: SimCLR


@dataclass(kw_only=True)
class _TrainMAE(_Training):
    """Pretrain an encoder with MAE."""

    recipe: MAE


def _train_command(preset: str) -> Callable[[Any], None]:
    """The command `train`, whose defaults are those of a preset."""

    def default(method: str) -> dict[str, Any]:
        # The other method may not know this preset: its defaults are then never used.
        recipe = METHODS[method].preset(preset) if preset in PRESETS[method] else METHODS[method]()
        return {"source": tyro.MISSING, "preset": preset, "recipe": recipe, "options": RunOptions()}

    def train(method: Any) -> None:
        """Pretrain an encoder on your own images: `train simclr PATH` or `train mae PATH`."""
        recipe = cast(Recipe, method.recipe)
        if method.preset not in PRESETS[recipe.method]:
            known = ", ".join(PRESETS[recipe.method])
            raise RecipeError(f"preset={method.preset!r} is unknown to {recipe.method}: expected one of {known}")
        recipe.train(method.source, **vars(method.options))

    train.__annotations__["method"] = (
        Annotated[_TrainSimCLR, tyro.conf.subcommand("simclr", default=_TrainSimCLR(**default("simclr")))]
        | Annotated[_TrainMAE, tyro.conf.subcommand("mae", default=_TrainMAE(**default("mae")))]
    )
    return train


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error that we foresaw is one line on stderr, and exit status 1."""
    given = sys.argv[1:] if arguments is None else arguments
    early = argparse.ArgumentParser("vision-ssl", add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="small-64")
    preset = early.parse_known_args(given)[0].preset
    commands: dict[str, Callable[..., None]] = {
        "list": list_command,
        "info": info_command,
        "demo": demo_command,
        "train": _train_command(preset),
        "extract": extract_command,
        "probe": probe_command,
        "knn": knn_command,
        "reconstruct": reconstruct_command,
        "plot": plot_command,
        "push": push_command,
    }
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="vision-ssl",
            description="Pretrained SimCLR and MAE encoders: load, pretrain, measure.",
            args=given,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
    except (VisionSSLError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
