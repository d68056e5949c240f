"""The commands that write pages and hand metrics on. They import what they need when they run, as `cli` does."""

from pathlib import Path
from typing import Annotated

import tyro

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
