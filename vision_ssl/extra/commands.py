"""The commands of what lies here, a function each, which imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import RecipeError

Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
Names = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME ...")]


def report_command(
    name: Name,
    /,
    *,
    data: str,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
    per_class: int = 50,
    device: str = "auto",
) -> None:
    """Write a page about a model: scores, curves, confusions, neighbours, and what it sees. One file of HTML.

    Args:
        name: A model, the directory of a run, or a folder of weights.
        data: Labelled images with a training and a validation split.
        out: Where the page goes.
        per_class: Images of each class that take part, in both splits.
        device: `auto`, `cpu`, `cuda`, ...
    """
    from ..device import pick_device
    from .report_page import write_report

    for label, reports in write_report(name, data, out, per_class=per_class, device=pick_device(device)).items():
        for report in reports:
            print(f"{label}, {report}")
    print(out)


def compare_command(
    names: Names,
    /,
    *,
    data: str,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("compare.html"),
    per_class: int = 50,
    device: str = "auto",
) -> None:
    """Compare models on the same images: print a table and their differences, and write a page with their curves.

    Args:
        names: At least two models, directories of runs, or folders of weights.
        data: Labelled images with a training and a validation split.
        out: Where the page goes.
        per_class: Images of each class that take part, in both splits.
        device: `auto`, `cpu`, `cuda`, ...
    """
    from ..device import pick_device
    from .compare_page import write_comparison

    print(write_comparison(names, data, out, per_class=per_class, device=pick_device(device)))
    print(f"\n{out}")


def track_command(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    to: Literal["tensorboard", "wandb"],
) -> None:
    """Hand the metrics of a run to TensorBoard or Weights & Biases.

    Args:
        run: The directory of a run.
        to: `tensorboard`, into its folder `tensorboard`; or `wandb`, which with WANDB_MODE=offline sends nothing.
    """
    from .tracking import track

    print(track(run, to))


def import_command(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    /,
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    stem: Literal["7x7", "3x3", "3x3-nopool"] | None = None,
    image_size: int | None = None,
) -> None:
    """Turn a checkpoint of another program into weights that load here; say what was recognised. Nothing in it runs.

    Args:
        file: A checkpoint of facebookresearch/mae, timm, torchvision, transformers, lightly, solo-learn, VISSL, ...
        out: Folder for the weights, new or empty.
        stem: ResNets with a 3x3 convolution first: whether a max-pool follows it. By default none does
            (`3x3-nopool`), and above 40 px one does (`3x3`).
        image_size: ResNets: side of the input, pixels; by default 224, and for the two small stems 64 and 32.
    """
    from .convert import convert

    print(convert(file, out, stem=stem, image_size=image_size))


def export_command(
    name: Name,
    /,
    *,
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    format: Literal["transformers", "onnx", "torch.export"],
) -> None:
    """Write an encoder in the form of another program; ONNX and torch.export are run and compared with it.

    Args:
        name: A model, the directory of a run, or a folder of weights.
        out: Folder to write to, new or empty.
        format: `transformers` (ViTs: a ViTMAE where there is a decoder, otherwise a ViT), `onnx` (`model.onnx`) or
            `torch.export` (`model.pt2`); the last two take batches of any size.
    """
    from .export import export

    print(export(name, out, format=format))


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
    from .push import push, push_zoo

    if zoo is not None and run is None:
        for result in push_zoo(zoo, private=private, tag=tag, dry_run=dry_run):
            print(result)
    elif zoo is None and run is not None and repo is not None:
        print(push(run, repo, private=private, tag=tag, dry_run=dry_run))
    else:
        raise RecipeError("push got neither RUN and REPO nor --zoo OWNER alone: expected one of the two")
