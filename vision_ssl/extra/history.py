"""How an encoder came to be: the curves of its pretraining, and of probes of the encoders that its run kept."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..plots import Record, read_metrics
from ..registry import find
from .charts import Line, Numbers, line_chart
from .html import Markup

SMOOTHED_BY = 50  # a running mean takes this fraction of a line


def loss_of(name: str) -> tuple[Numbers, Numbers] | None:
    """Epochs (n,) and training losses (n,) of the steps of a run, or None where there are none."""
    steps = _steps(_metrics(name))
    return (_column(steps, "epoch"), _column(steps, "loss")) if steps else None


def probe_curve_of(name: str) -> dict[str, Numbers] | None:
    """The columns of the `probe_curve.csv` of a run, or None where none was made.

    Raises:
        DataError: The table is damaged.
    """
    path = _folder(name) / "probe_curve.csv"
    if not path.is_file():
        return None
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if not rows:
        return None
    try:
        return {
            column: np.array([float(row[column]) for row in rows]) for column in ("epoch", "accuracy", "val_accuracy")
        }
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error!r}") from error


def pretraining_charts(name: str) -> list[Markup]:
    """Loss, learning rate, and what was measured meanwhile; nothing of weights without metrics."""
    records = _metrics(name)
    steps = _steps(records)
    if not steps:
        return []
    epochs = _column(steps, "epoch")
    rate = Line("", epochs, _column(steps, "lr"))
    charts = [
        line_chart("training loss", smoothed("", epochs, _column(steps, "loss"), 0), x_label="epoch", y_label="loss"),
        line_chart("learning rate", [rate], x_label="epoch", y_label="learning rate", from_zero=True),
    ]
    accuracies = [_logged(records, "knn_accuracy", "kNN", 0), _logged(records, "linear_accuracy", "linear", 1)]
    if lines := [line for line in accuracies if line is not None]:
        title = "accuracy while training"
        charts.append(line_chart(title, lines, x_label="epoch", y_label="accuracy (%)", from_zero=True))
    if (rank := _logged(records, "effective_rank", "", 0)) is not None:
        charts.append(line_chart("effective rank", [rank], x_label="epoch", y_label="effective rank", from_zero=True))
    return charts


def probe_chart(name: str) -> Markup | None:
    """Accuracies of a probe over the epochs of a run, where they were measured."""
    curve = probe_curve_of(name)
    if curve is None:
        return None
    lines = [
        Line("training", curve["epoch"], curve["accuracy"], 0),
        Line("validation", curve["epoch"], curve["val_accuracy"], 1),
    ]
    return line_chart("accuracy of a probe", lines, x_label="epoch", y_label="accuracy (%)", from_zero=True)


def smoothed(label: str, x: Numbers, y: Numbers, series: int) -> list[Line]:
    """A line; of many points, a faint one and its running mean."""
    window = len(y) // SMOOTHED_BY
    if window < 2:
        return [Line(label, x, y, series)]
    mean = np.convolve(y, np.full(window, 1 / window), mode="valid")
    return [Line("", x, y, series, faint=True), Line(label, x[window // 2 :][: len(mean)], mean, series)]


def _metrics(name: str) -> Sequence[Record]:
    folder = _folder(name)
    return read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []


def _steps(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "loss" in record]


def _logged(records: Sequence[Record], name: str, label: str, series: int) -> Line | None:
    """What some records alone have, if any."""
    found = [record for record in records if name in record]
    return Line(label, _column(found, "epoch"), _column(found, name), series) if found else None


def _column(records: Sequence[Record], name: str) -> Numbers:
    return np.array([record[name] for record in records], dtype=np.float64)


def _folder(name: str) -> Path:
    known = find(name)
    return known.directory if known else Path(name)
