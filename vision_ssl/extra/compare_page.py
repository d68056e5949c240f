"""The page that compares encoders on the same images: a table, their curves, and the differences in pairs."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..data import Source
from ..errors import DataError
from ..report import Difference, Report, paired_bootstrap
from ..storage import save_text
from .charts import Line, interval_chart, line_chart, panels
from .history import loss_of, probe_curve_of, smoothed
from .html import Markup, Section, data_table, page, tag
from .measured import features_of, open_samples, probes

HEADINGS = (
    *("model", "architecture", "parameters", "time an epoch", "training accuracy (%)", "validation accuracy (%)"),
    *("95 % interval", "macro F1"),
)
PAIR_HEADINGS = ("model", "minus", "points", "95 % interval", "may be chance")


@dataclass(frozen=True)
class Compared:
    """One of the encoders.

    Attributes:
        name: As it was asked for.
        architecture: As timm names it.
        parameters: How many.
        card: What is known of it.
        report: Of a linear probe.
    """

    name: str
    architecture: str
    parameters: int
    card: dict[str, Any]
    report: Report

    @property
    def row(self) -> tuple[str, ...]:
        """What the table says of it, under `HEADINGS`."""
        training = self.card.get("training", {})
        return (
            self.name,
            self.architecture,
            f"{self.parameters / 1e6:.1f} M",
            _duration(60 * training["minutes"] / training["epochs"]) if training.get("epochs") else "-",
            f"{self.report.train_accuracy:.1f}",
            f"{self.report.accuracy:.1f}",
            "{:.1f} to {:.1f}".format(*self.report.interval),
            f"{self.report.macro_f1:.3f}",
        )


def write_comparison(
    names: Sequence[str],
    data: Source,
    out: str | os.PathLike[str],
    *,
    per_class: int = 50,
    device: torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Measure encoders by a linear probe on the same labelled images, and write a page of HTML about them.

    Args:
        names: At least two models, directories of runs, or folders of weights.
        data: A labelled source with images to fit on ("train") and to score on ("val").
        out: Where the page goes.
        per_class: Images of each class that take part, in both splits.
        device: Where the encoders compute; by default on the CPU.
        cache_dir: Where decoded images are kept.

    Returns:
        The same tables in markdown.

    Raises:
        DataError: There are fewer than two names, or one comes twice; or the source cannot be read or has no labels.
        WeightsError: A name is unknown.
        RecipeError: `per_class` is too small.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"names={', '.join(names)!r}: expected at least two, each of them once")
    compared = [_measure(name, data, per_class, device, cache_dir) for name in names]
    rows, pairs = [one.row for one in compared], _pairs(compared)
    first = compared[0].report
    lead = tag(
        "p",
        f"A linear classifier on the features of each, fitted on {first.n_train:,} images and scored on "
        f"{first.n_val:,} others of {Path(str(data)).name}.",
    )
    sections = [
        Section("Scores", [_chart(compared), data_table("Scores", HEADINGS, rows, words=2)]),
        Section("Differences", [tag("p", _EXPLAINED), data_table("Differences", PAIR_HEADINGS, pairs, words=2)]),
    ]
    if charts := _curves(compared):
        caption = (
            "Losses of different methods mean different things, and have a chart each; of many steps, a running mean."
        )
        sections.append(Section("Curves", panels(charts, caption)))
    save_text(Path(out), page(f"{', '.join(names[:-1])} and {names[-1]}", lead, sections))
    return f"{_markdown(HEADINGS, rows, words=2)}\n\n{_markdown(PAIR_HEADINGS, pairs, words=2)}"


_EXPLAINED = (
    "In percentage points of validation accuracy, by a paired bootstrap over the images scored. A difference whose "
    "interval holds 0 may be chance."
)


def _measure(
    name: str, data: Source, per_class: int, device: torch.device | None, cache_dir: str | os.PathLike[str] | None
) -> Compared:
    encoder = hub.load(name)
    train, val = features_of(encoder, open_samples(encoder, data, per_class, cache_dir), device)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return Compared(name, train.encoder, parameters, encoder.card, probes(train, val)[0])


def _pairs(compared: Sequence[Compared]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for a, b in combinations(compared, 2):
        difference: Difference = paired_bootstrap(a.report, b.report)
        low, high = difference.interval
        rows.append(
            (
                a.name,
                b.name,
                f"{difference.points:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
                "yes" if low <= 0 <= high else "no",
            )
        )
    return rows


def _chart(compared: Sequence[Compared]) -> Markup:
    rows = [(one.name, one.report.accuracy, *one.report.interval) for one in compared]
    chart = interval_chart(
        compared[0].report.protocol, rows, "validation accuracy (%)", highest=max(high for *_, high in rows)
    )
    return panels([chart], "Whiskers: 95 % bootstrap intervals over the images scored.")


def _curves(compared: Sequence[Compared]) -> list[Markup]:
    """The curves of probes where there are any; of the other models, the training loss, a chart for each method."""
    probed: list[Line] = []
    losses: dict[str, list[Line]] = defaultdict(list)
    for series, one in enumerate(compared):
        curve, loss = probe_curve_of(one.name), loss_of(one.name)
        if curve is not None:
            probed.append(Line(one.name, curve["epoch"], curve["val_accuracy"], series))
        elif loss is not None:
            losses[str(one.card.get("method"))].append(smoothed(one.name, *loss, series)[-1])
    charts = [
        line_chart(f"training loss of {method}", lines, x_label="epoch", y_label=f"{method}: training loss")
        for method, lines in losses.items()
    ]
    if probed:
        label = "validation accuracy of a probe (%)"
        charts.insert(0, line_chart(label, probed, x_label="epoch", y_label=label, from_zero=True))
    return charts


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    rule = [":--"] * words + ["--:"] * (len(headings) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))
