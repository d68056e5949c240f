"""How a probe improves over the epochs of a run, from the encoders that the run kept."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import hub, plots
from .errors import DataError, RecipeError
from .features import images_for
from .options import Protocol
from .pretrain import Run
from .probe import evaluate
from .storage import save_text

if TYPE_CHECKING:
    from .data import Source

COLUMNS = ("epoch", "loss", "accuracy", "val_accuracy")


def probe_curve(
    run: str | os.PathLike[str],
    *,
    train: "Source",
    val: "Source",
    protocol: Protocol = "linear",
    out: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> tuple[Path, Path]:
    """Measure every encoder that a run kept by a linear probe; write a table and draw it.

    Args:
        run: The directory of a run that was started with `keep_epochs`.
        train: Labelled images to fit on, as for `evaluate`.
        val: Labelled images to score on.
        protocol: A linear one.
        out: The table; by default `probe_curve.csv` in the run. The picture lies beside it.
        cache_dir: Where the decoded images are kept.
        **settings: Further arguments of `evaluate`.

    Returns:
        The table, with a line for each encoder: `epoch`, `loss` (nats) and `accuracy` (percent) on the training
        images, and `val_accuracy`; and the picture. The table is written anew after each encoder.

    Raises:
        DataError: The run kept no encoder, or a source cannot be read or has no labels.
        RecipeError: There is no such linear protocol.
        MissingExtraError: matplotlib is not installed.
    """
    if not protocol.startswith("linear"):
        raise RecipeError(f"protocol={protocol!r} is not drawn as a curve: expected a linear one, such as 'linear'")
    kept = Run(Path(run)).kept
    if not kept:
        raise DataError(
            f"run={str(run)!r} kept no encoder: expected epochs/0005 and so on, as keep_epochs=5 makes them"
        )
    table = Path(out or Path(run) / "probe_curve.csv")
    first = hub.load(next(iter(kept.values())))
    train = images_for(first, train, split="train", cache_dir=cache_dir, require_labels=True)[0]
    val = images_for(first, val, split="val", cache_dir=cache_dir, require_labels=True)[0]
    rows: list[dict[str, float]] = []
    for epoch, folder in kept.items():
        report = evaluate(hub.load(folder), train=train, val=val, protocol=protocol, cache_dir=cache_dir, **settings)
        values = (epoch, report.train_loss, report.train_accuracy, report.accuracy)
        rows.append(dict(zip(COLUMNS, cast(tuple[float, ...], values), strict=True)))
        lines = [",".join(COLUMNS), *(",".join(f"{value:.6g}" for value in row.values()) for row in rows)]
        save_text(table, "\n".join(lines) + "\n")
    return table, plots.probe_curve(rows, f"{protocol}, {len(kept)} encoders", table.with_suffix(".png"))
