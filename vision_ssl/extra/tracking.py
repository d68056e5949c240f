"""The metrics of a run for TensorBoard and Weights & Biases, from the `metrics.jsonl` that every run has."""

import os
from pathlib import Path
from typing import Literal, get_args

from ..errors import MissingExtraError, RecipeError
from ..plots import Record, read_metrics
from ..pretrain import Run
from ..storage import check_new_folder

Tracker = Literal["tensorboard", "wandb"]

TENSORBOARD_FOLDER = "tensorboard"
WANDB_PROJECT = "vision_ssl"


def track(run: str | os.PathLike[str], to: Tracker) -> str:
    """Hand the metrics of a run to a tracker, each under its step.

    Args:
        run: The directory of a run; it may still go on.
        to: "tensorboard", into the folder `tensorboard` of the run; or "wandb", with the run's recipe, as its own
            settings say where and whether to send it (`WANDB_PROJECT`, `WANDB_MODE=offline`).

    Returns:
        Where it is, in a line.

    Raises:
        RecipeError: There is no such tracker.
        MissingExtraError: It is not installed.
        DataError: There are no metrics.
        CheckpointError: This is no run, or its metrics are in TensorBoard's form already.
    """
    if to == "tensorboard":
        return _to_tensorboard(Path(run))
    if to == "wandb":
        return _to_wandb(Path(run))
    raise RecipeError(f"to={to!r} is unknown: expected {' or '.join(get_args(Tracker))}")


def _to_tensorboard(run: Path) -> str:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tracking") from error
    records = read_metrics(run)
    out = run / TENSORBOARD_FOLDER
    check_new_folder(out)
    with SummaryWriter(str(out)) as writer:
        for record in records:
            for name, value in _values(record).items():
                writer.add_scalar(name, value, int(record["step"]))
    return f"{out}: {len(records):,} records; see them with tensorboard --logdir {run.parent}"


def _to_wandb(run: Path) -> str:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("wandb", "tracking") from error
    records = read_metrics(run)
    name = run.resolve().name
    project = os.environ.get("WANDB_PROJECT", WANDB_PROJECT)
    logged = wandb.init(project=project, name=name, dir=str(run), config=Run(run).settings)
    for record in records:
        logged.log(_values(record), step=int(record["step"]))
    logged.finish()
    return f"{project}/{name}: {len(records):,} records"


def _values(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step"}
