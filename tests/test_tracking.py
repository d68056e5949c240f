import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vision_ssl import cli
from vision_ssl.errors import CheckpointError, DataError, MissingExtraError, RecipeError
from vision_ssl.extra.tracking import track

RECORDS: list[dict[str, float]] = [
    {"step": 1, "epoch": 0.5, "loss": 2.0},
    {"step": 2, "epoch": 1.0, "loss": 1.5},
    {"step": 2, "epoch": 1.0, "knn_accuracy": 40.0},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "photos"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "run.json").write_text('{"recipe": {"method": "mae"}, "options": {"seed": 0}}')
    return folder


def test_tensorboard_reads_what_was_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["track", str(run), "--to", "tensorboard"])
    assert capsys.readouterr().out == f"{run}/tensorboard: 3 records; see them with tensorboard --logdir {run.parent}\n"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars == {
        "epoch": [(1, 0.5), (2, 1.0), (2, 1.0)],
        "loss": [(1, 2.0), (2, 1.5)],
        "knn_accuracy": [(2, 40.0)],
    }


def test_tensorboard_does_not_write_twice(run: Path) -> None:
    track(run, "tensorboard")
    with pytest.raises(CheckpointError, match="tensorboard' is there already"):
        track(run, "tensorboard")


def test_wandb_gets_every_record_and_the_recipe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    logged = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )

    def init(**given: Any) -> Any:
        calls.append(given)
        return logged

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert track(run, "wandb") == "vision_ssl/photos: 3 records"
    config = {"recipe": {"method": "mae"}, "options": {"seed": 0}}
    assert calls == [
        {"project": "vision_ssl", "name": "photos", "dir": str(run), "config": config},
        (1, {"epoch": 0.5, "loss": 2.0}),
        (2, {"epoch": 1.0, "loss": 1.5}),
        (2, {"epoch": 1.0, "knn_accuracy": 40.0}),
        "finished",
    ]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert track(run, "wandb") == "mine/photos: 3 records"
    assert calls[5]["project"] == "mine"


@pytest.mark.parametrize(("to", "module"), [("tensorboard", "torch.utils.tensorboard.writer"), ("wandb", "wandb")])
def test_missing_tracker_names_the_extra(to: Any, module: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=rf'{to} is not installed: pip install "vision-ssl\[tracking\]"'):
        track(run, to)


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(DataError, match=r"has no metrics\.jsonl"):
        track(tmp_path, "tensorboard")
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(RecipeError, match="to='aim' is unknown: expected tensorboard or wandb"):
        track(run, "aim")  # type: ignore[arg-type]  # that is what is tested
