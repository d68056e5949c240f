import json
import re
from pathlib import Path

import pytest

from benchmarks.gpu import job, series
from benchmarks.gpu.pack import INDEX, join, split
from vision_ssl import cli
from vision_ssl.options import RunOptions
from vision_ssl.recipes import Recipe

README = Path(job.__file__).with_name("README.md")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept = tmp_path / "kept"
    (kept / "weights").mkdir(parents=True)
    (kept / "run.json").write_text("{}")
    (kept / "weights" / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (kept / "weights" / "empty").write_bytes(b"")
    return kept


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_split_is_joined_again(tmp_path: Path, folder: Path) -> None:
    index, *parts = split(folder, tmp_path / "parts", size=10_000)
    assert index.name == INDEX
    assert len(parts) > 2
    assert all(path.stat().st_size <= 10_000 for path in parts)
    join(tmp_path / "parts", tmp_path / "joined")
    assert contents(tmp_path / "joined") == contents(folder)


def test_a_missing_or_changed_part_is_refused(tmp_path: Path, folder: Path) -> None:
    _, *parts = split(folder, tmp_path / "parts", size=10_000)
    whole = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(SystemExit, match=r"parts lacks 01\.part"):
        join(tmp_path / "parts", tmp_path / "joined")
    parts[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SystemExit, match=r"has SHA-256 [0-9a-f]{64}: expected"):
        join(tmp_path / "parts", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_parts_leave_in_batches(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for name in ("weights", "results"):
        (run / name).mkdir(parents=True)
        (run / name / "file").write_bytes(bytes(40_000))
    for name in ("run.json", "metrics.jsonl", "probe_curve.csv"):
        (run / name).write_text(name)
    monkeypatch.setattr(job, "split", lambda kept, parts: split(kept, parts, size=20_000))
    together = tmp_path / "together"
    together.mkdir()
    job.pack(run)
    assert job.hand_over(run, together, batch=0) > 0
    assert len(list(together.iterdir())) == 1 + job.BATCH
    assert job.hand_over(run, together, batch=1) == 0
    join(together, tmp_path / "joined")
    names = {"weights/file", "results/file", "run.json", "metrics.jsonl", "probe_curve.csv"}
    assert set(contents(tmp_path / "joined")) == names


@pytest.mark.parametrize("name", job.TRAININGS)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_training_is_a_valid_command(name: str, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Recipe, RunOptions]] = []

    def remember(recipe: Recipe, source: str, options: RunOptions) -> None:
        asked.append((recipe, options))

    monkeypatch.setattr("vision_ssl.pretrain.pretrain", remember)
    training = job.TRAININGS[name]
    settings = training.settings.split() + (training.tiny.split() if tiny else [])
    cli.main(["train", training.method, "data", "--epochs", "3", *settings])
    [(recipe, _)] = asked
    assert recipe.encoder == ("resnet18" if name == "cifar10_speed" else name.partition("_")[2])
    assert (recipe.batch_size == 500) == tiny


def test_weights_are_packed_before_their_curve_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    run = work / "mae_vit_tiny-0"
    (run / "weights").mkdir(parents=True)
    out.mkdir()
    for name in ("run.json", "metrics.jsonl", "weights/model.safetensors"):
        (run / name).write_text(name)
    monkeypatch.setattr(job, "finished", lambda run: True)

    def probe(*words: object) -> None:
        assert "--every-checkpoint" in words
        assert (out / "00.part").exists()
        (run / "probe_curve.csv").write_text("epoch,loss,accuracy,val_accuracy")

    monkeypatch.setattr(job, "run", probe)
    arguments = job.Arguments("mae_vit_tiny", work=work, out=out, measure="curve")
    job.train(arguments, job.TRAININGS["mae_vit_tiny"])
    assert {path.name for path in out.iterdir()} == {"00.part", INDEX, "probe_curve.csv"}


@pytest.mark.parametrize("init", [False, True])
def test_a_training_goes_on_from_earlier_weights_when_asked(init: bool) -> None:
    arguments = job.Arguments("mae_vit_tiny", work=Path("work"), out=Path("out"), init=init)
    settings = [*map(str, job.settings(arguments, job.TRAININGS["mae_vit_tiny"])), "--init", ""]
    assert settings[settings.index("--init") + 1] == ("mae_vit_tiny" if init else "")


def test_a_pilot_tells_the_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*words: object) -> None:
        assert words[words.index("--compile") + 1] == "on"
        out = Path(str(words[words.index("--out") + 1]))
        out.mkdir()
        (out / "run.json").write_text("{}")
        # Between two waits for the device, 19 steps are only begun; the second half of a run is what counts.
        speeds = [*[5.0] * 40, *([1000.0] * 19 + [10.0]) * 2, *[1000.0] * 13]
        lines = (json.dumps({"images_per_second": speed}) for speed in speeds)
        (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(job, "run", train)
    arguments = job.Arguments("mae_vit_small", work=tmp_path, out=tmp_path, device="cuda", compile="on")
    job.pilot(arguments, job.TRAININGS["mae_vit_small"])
    # 40 steps in 38 / 1000 + 2 / 10 batches a second
    assert capsys.readouterr().out == "mae_vit_small, compile on: 168 images/s\n"


def test_the_queue_lists_every_job_in_its_order() -> None:
    rows = re.findall(r"^\| \d+ \| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert rows == list(job.JOBS)


@pytest.mark.parametrize(
    "given",
    [
        "simclr_resnet18",
        "simclr_resnet18=",
        "simclr_resnet18=0",
        "simclr_resnet18=1.5",
        "simclr_resnet18=²",
        "smoke=1",
        "=2",
    ],
)
def test_a_series_refuses_what_is_no_job_with_epochs(given: str) -> None:
    with pytest.raises(SystemExit, match=rf"^jobs='{given}': expected NAME=EPOCHS, with one of simclr_resnet18, "):
        series.parsed(("mae_vit_tiny=15", given))


def test_a_series_compiles_together_and_trains_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    class Job:
        def __init__(self, command: list[str], **_: object) -> None:
            pilot = "--pilot" in command
            assert command[command.index("--data") + 1] == ("part" if pilot else "data")
            compile = command[command.index("--compile") + 1]
            epochs = "" if pilot else f" {command[command.index('--epochs') + 1]}"
            assert ("--init" in command) == (not pilot)
            self.name, self.what = command[3], f"{'pilot' if pilot else 'train'} {command[3]} {compile}{epochs}"
            begun.append(self.what)

        def wait(self) -> int:
            begun.append(f"end of {self.what}")
            return 1 if self.name == "mae_vit_tiny" else 0

    monkeypatch.setattr("subprocess.Popen", Job)
    ready = tmp_path / "ready"
    monkeypatch.setattr("time.sleep", lambda _: ready.touch())
    jobs = ("mae_vit_tiny=20", "simclr_resnet18=15")
    work, out = tmp_path / "work", tmp_path / "out"
    series.main(series.Arguments(jobs, data="data", work=work, out=out, part="part", wait_for=ready, init=True))
    pilots = ["pilot mae_vit_tiny on", "pilot simclr_resnet18 on"]
    trainings = ["train mae_vit_tiny off 20", "train simclr_resnet18 on 15"]
    in_a_row = [f"{end}{training}" for training in trainings for end in ("", "end of ")]
    assert begun == [*pilots, *(f"end of {pilot}" for pilot in pilots), *in_a_row]
    log = [line.partition(" ")[2] for line in (out / series.LOG).read_text().splitlines()]
    assert log == [
        "not compiled mae_vit_tiny",
        "compiled simclr_resnet18",
        "trained mae_vit_tiny 1",
        "trained simclr_resnet18 0",
        "done",
    ]
