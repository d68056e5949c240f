"""The page about one encoder: how well its features tell classes apart, how it came to be, and what it sees."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .. import __version__, hub
from ..card import describe_origin
from ..data import Source
from ..features import Features
from ..pretrain import commit_of_package, describe_machine
from ..report import Labels, Report, paired_bootstrap
from ..restore import random_encoder
from ..storage import save_text
from . import gallery
from .charts import Group, Numbers, interval_chart, panels, scatter
from .glimpses import principal_components
from .history import pretraining_charts, probe_chart
from .html import Child, Markup, Section, data_table, facts, figure, page, scrolling, tag
from .measured import PIXELS, Samples, features_of, open_samples, pixels_of, probes
from .pictures import heat_map

PRETRAINED, UNTRAINED = "pretrained", "untrained"
FEW = 20  # classes, up to which a confusion matrix is a table
LISTED = 5  # best and worst classes, where there are more than twice as many
PAIRS = 10  # most-confused classes
MARKED = 8  # classes with a colour in the map, where there are more than `FEW`
POINTS = 2_000  # in the map

Scores = Mapping[str, tuple[Report, Report]]


def write_report(
    name: str,
    data: Source,
    out: str | os.PathLike[str],
    *,
    per_class: int = 50,
    device: torch.device | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Scores:
    """Measure an encoder on a sample of labelled images, and write a page of HTML about it.

    Args:
        name: A model, the directory of a run, or a folder of weights.
        data: A labelled source with images to fit on ("train") and to score on ("val").
        out: Where the page goes.
        per_class: Images of each class that take part, in both splits.
        device: Where the encoder computes; by default on the CPU.
        cache_dir: Where decoded images are kept.

    Returns:
        The linear and the kNN report of `pretrained` features, of `untrained` ones where the recipe is known, and of
        raw pixels.

    Raises:
        DataError: The source cannot be read or has no labels.
        WeightsError: The name is unknown.
        RecipeError: `per_class` is too small.
    """
    encoder = hub.load(name)
    samples = open_samples(encoder, data, per_class, cache_dir)
    train, val = features_of(encoder, samples, device)
    scores = {PRETRAINED: probes(train, val)}
    if "recipe" in encoder.card:  # foreign weights have none, from which to build the same encoder
        scores[UNTRAINED] = probes(*features_of(random_encoder(name), samples, device))
    scores[f"raw pixels, {PIXELS} px"] = probes(*pixels_of(samples, cache_dir))
    linear = scores[PRETRAINED][0]
    card = encoder.card
    sections = [
        Section("Scores", _scores(scores)),
        Section("Neighbours", gallery.neighbours(samples, train, val)),
        Section("Classes", _classes(linear)),
        Section("Confusions", _confusions(linear)),
        Section("Map", _map(linear, val)),
    ]
    if card.get("method") == "mae" and samples.val.pixels.shape[1] in (1, 3):  # of others there are no pictures
        sections.append(Section("Reconstructions", gallery.reconstructions(name, samples.val)))
    sections.append(Section("Glimpses", gallery.glimpses(encoder, samples.val)))
    if history := _history(name):
        sections.append(Section("Training", history))
    sections.append(Section("Provenance", _provenance(card, linear, samples, device)))
    title = str(card.get("name") or Path(name).name)
    save_text(Path(out), page(title, _lead(train, scores, samples), sections))
    return scores


def _lead(train: Features, scores: Scores, samples: Samples) -> Markup:
    linear = scores[PRETRAINED][0]
    gain = f", {paired_bootstrap(linear, scores[UNTRAINED][0])} by its training" if UNTRAINED in scores else ""
    return tag(
        "p",
        f"A linear classifier on its {train.features.shape[1]} features recognises ",
        tag("strong", f"{linear.accuracy:.1f} %"),
        f" of {linear.n_val:,} images of {samples.val.name}, on which it was not fitted{gain}.",
    )


def _scores(scores: Scores) -> list[Child]:
    reports = list(zip(*scores.values(), strict=True))
    highest = max(report.interval[1] for protocol in reports for report in protocol)
    charts = [
        interval_chart(
            protocol[0].protocol,
            [(label, report.accuracy, *report.interval) for label, report in zip(scores, protocol, strict=True)],
            "accuracy (%)",
            highest=highest,
        )
        for protocol in reports
    ]
    rows = [
        (
            f"{report.protocol}, {label}",
            f"{report.accuracy:.1f}",
            "{:.1f} to {:.1f}".format(*report.interval),
            f"{report.macro_f1:.3f}",
            "-" if report.train_accuracy is None else f"{report.train_accuracy:.1f}",
        )
        for protocol in reports
        for label, report in zip(scores, protocol, strict=True)
    ]
    headings = ("protocol, features", "accuracy (%)", "95 % interval", "macro F1", "training accuracy (%)")
    first = scores[PRETRAINED][0]
    caption = (
        f"Fitted on {first.n_train:,} images and scored on {first.n_val:,} others. Whiskers: 95 % bootstrap intervals "
        "over the images scored. Untrained: the same network with random weights."
    )
    return [panels(charts, caption), data_table("Scores", headings, rows)]


def _history(name: str) -> list[Child]:
    content: list[Child] = []
    if charts := pretraining_charts(name):
        content.append(panels(charts, "Over the epochs of pretraining. Bold lines are running means."))
    if chart := probe_chart(name):
        content.append(panels([chart], "A linear probe of each encoder that the run kept (its probe_curve.csv)."))
    return content


def _classes(report: Report) -> list[Child]:
    scored = [(name, scores) for name, scores in report.per_class.items() if scores["accuracy"] is not None]
    ranked = sorted(scored, key=lambda item: -cast(float, item[1]["accuracy"]))
    rows = [
        (name, f"{scores['accuracy']:.1f}", f"{scores['f1']:.3f}", str(scores["support"])) for name, scores in ranked
    ]
    headings = ("class", "accuracy (%)", "F1", "images")
    if len(rows) <= 2 * LISTED:
        return [tag("p", "By the linear probe, best first."), data_table("Classes", headings, rows)]
    return [
        tag("p", f"By the linear probe: of {len(rows)} classes, the {LISTED} best and the {LISTED} worst."),
        tag("h3", "Best"),
        data_table("Best classes", headings, rows[:LISTED]),
        tag("h3", "Worst"),
        data_table("Worst classes", headings, rows[: -LISTED - 1 : -1]),
    ]


def _confusions(report: Report) -> list[Child]:
    counts, classes = report.confusion(), list(report.per_class)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mistakes = counts - np.diag(np.diag(counts))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:PAIRS]
    pairs = [np.unravel_index(index, counts.shape) for index in order if mistakes.flat[index] > 0]
    rows = [
        (classes[row], classes[column], str(counts[row, column]), f"{100 * shares[row, column]:.0f}")
        for row, column in pairs
    ]
    caption = (
        "Of the linear probe: a row is what an image is, a column what it was taken for. The stronger the blue, the "
        "larger the share of the row."
    )
    if len(classes) <= FEW:
        shown = figure(_matrix(counts, shares, classes), caption)
    else:
        alt = f"confusion matrix of {len(classes)} classes; the table below names the most confused"
        picture = tag("div", heat_map(torch.from_numpy(shares), alt), class_="heat")
        shown = figure(picture, f"{caption} The classes are in label order, from {classes[0]} to {classes[-1]}.")
    if not rows:
        return [shown, tag("p", "No image was taken for another class.")]
    headings = ("is", "taken for", "images", "of its class (%)")
    return [shown, tag("h3", "Most confused"), data_table("Most confused classes", headings, rows, words=2)]


def _matrix(counts: Labels, shares: Numbers, classes: Sequence[str]) -> Markup:
    head = tag("tr", tag("th", "is \\ taken for", scope="col"), (tag("th", name, scope="col") for name in classes))
    body = (
        tag(
            "tr",
            tag("th", name, scope="row"),
            (
                tag("td", str(count), style=f"--share: {share:.3f}", class_=_kind(count, row == column))
                for column, (count, share) in enumerate(zip(counts[row], shares[row], strict=True))
            ),
        )
        for row, name in enumerate(classes)
    )
    table = tag("table", tag("thead", head), tag("tbody", body), class_="matrix")
    return scrolling("Confusion matrix", table)


def _kind(count: int, diagonal: bool) -> str | None:
    if diagonal:
        return "diagonal"
    return None if count else "zero"


def _map(report: Report, val: Features) -> list[Child]:
    projected, shares = principal_components(val.features, 2)
    chosen = torch.linspace(0, len(val) - 1, min(len(val), POINTS)).round().long()
    points, labels = projected[chosen].numpy(), cast(Tensor, val.labels)[chosen].numpy()
    marked = _marked(report)
    many = len(val.classes) > FEW
    groups = [Group("", points[~np.isin(labels, marked)], None)] if many else []
    groups += [Group(val.classes[label], points[labels == label], series) for series, label in enumerate(marked)]
    x_label, y_label = (
        f"{which} component, {100 * share:.0f} % of the variance"
        for which, share in zip(("first", "second"), shares.tolist(), strict=True)
    )
    caption = f"Features of {len(points):,} validation images, projected on the two directions in which they vary most."
    if many:
        caption += (
            f" In colour, the {MARKED // 2} classes that the linear probe tells best, and the {MARKED // 2} it "
            "tells worst; in gray, all others."
        )
    return [figure(scatter(caption, groups, x_label=x_label, y_label=y_label), caption)]


def _marked(report: Report) -> list[int]:
    """The classes to colour: all, or of many those that are recognised best and worst."""
    if len(report.per_class) <= FEW:
        return list(range(len(report.per_class)))
    accuracy = {
        label: scores["accuracy"]
        for label, scores in enumerate(report.per_class.values())
        if scores["accuracy"] is not None
    }
    ranked = sorted(accuracy, key=lambda label: -accuracy[label])
    return list(dict.fromkeys(ranked[: MARKED // 2] + ranked[-MARKED // 2 :]))


def _provenance(card: Mapping[str, Any], linear: Report, samples: Samples, device: torch.device | None) -> list[Child]:
    training, pretrained_on = card.get("training", {}), card.get("data", {})
    origin = [
        ("method", card.get("method")),
        ("pretrained on", pretrained_on.get("name")),
        ("images", pretrained_on.get("images")),
        ("digest of the images", _short(pretrained_on.get("digest"))),
        *((name, value) for name, value in training.items() if name != "init"),
        *([("started from", describe_origin(card))] if training else []),
        ("licence", card.get("licence")),
    ]
    measured = [
        ("data", samples.val.name.rpartition("/")[0] or samples.val.name),
        ("digest of the images fitted on", _short(linear.train_digest)),
        ("digest of the images scored on", _short(linear.val_digest)),
        *((f"linear: {name}", value) for name, value in linear.settings.items()),
        ("seed", linear.seed),
        ("vision_ssl", __version__),
        ("commit", commit_of_package()),
        ("torch", torch.__version__),
        ("hardware", describe_machine(device or torch.device("cpu"))),
    ]
    known = [(name, value) for name, value in origin if value is not None]
    content: list[Child] = [tag("h3", "Pretraining"), facts(known) if known else tag("p", "The weights have no card.")]
    if "recipe" in card:
        content += [tag("h3", "Recipe"), facts(card["recipe"].items())]
    return [*content, tag("h3", "This report"), facts(measured)]


def _short(digest: str | None) -> str | None:
    """Enough of a digest to tell it from others."""
    return digest and digest[:16]
