import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vision_ssl import cli, commands, registry
from vision_ssl.data import open_images
from vision_ssl.features import Features
from vision_ssl.hub import load
from vision_ssl.options import RunOptions
from vision_ssl.presets import PRESETS
from vision_ssl.pretrain import Run
from vision_ssl.probe import evaluate
from vision_ssl.recipes import MAE, METHODS, Recipe, SimCLR
from vision_ssl.registry import Weights
from vision_ssl.storage import load_tensors

COMMANDS = (
    *("list", "info", "demo", "train", "extract", "probe", "knn", "finetune", "leaks", "reconstruct", "plot"),
    *("report", "compare", "track", "import", "export", "push"),
)
TINY_MAE = MAE(
    encoder="vit_tiny",
    image_size=24,
    patch_size=8,
    batch_size=8,
    epochs=1,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
)
TRAIN_TINY_MAE = (
    "train mae --encoder vit_tiny --image-size 24 --patch-size 8 --batch-size 8 --epochs 1 --decoder-dim 16 "
    "--decoder-depth 1 --decoder-heads 2 --device cpu --precision fp32"
)


@pytest.fixture(autouse=True)
def warnings_are_shown_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of eight dark and eight bright images each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, brightness in (("bright", 180), ("dark", 60)):
            (folder / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.normal(brightness, 30, size=(30, 30, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mae"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        cli.main([*TRAIN_TINY_MAE.split(), str(pictures), "--out", str(out)])
    return out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Any, RunOptions]]:
    """What training is asked for, instead of the training."""
    asked: list[tuple[Recipe, Any, RunOptions]] = []
    monkeypatch.setattr("vision_ssl.pretrain.pretrain", lambda *given: asked.append(given))
    return asked


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail by a single line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(leaving.value.code, str)  # Python prints it on stderr, and leaves with status 1
    assert leaving.value.code.startswith("error: ")
    assert "\n" not in leaving.value.code
    captured = capsys.readouterr()
    assert captured.out == ""
    return leaving.value.code


def misunderstood(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that cannot be parsed; return what stderr says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(argument) for argument in arguments])
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_training_by_command_equals_training_in_python(tmp_path: Path, pictures: Path, run: Path) -> None:
    ours = TINY_MAE.train(pictures, out=tmp_path / "run", device="cpu", precision="fp32")
    assert ours.settings == Run(run).settings
    for file in ("checkpoint.safetensors", "weights/model.safetensors", "weights/head.safetensors"):
        by_command, in_python = (load_tensors(folder / file)[0] for folder in (run, ours.directory))
        assert by_command.keys() == in_python.keys()
        assert all(by_command[name].equal(in_python[name]) for name in by_command), file


def test_info_shows_the_card(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info", str(run)])
    card = json.loads(capsys.readouterr().out)
    assert card == Run(run).encoder.card
    assert card["method"] == "mae"


def test_extract(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "features.safetensors"
    cli.main(["extract", str(run), str(pictures), "-o", str(out), "--split", "val", "--batch-size", "3"])
    features = Features.load(out)
    assert capsys.readouterr().out == f"{out}: 16 x 192 features\n"
    assert features.digest == open_images(pictures, size=24, split="val").digest
    assert features.classes == ("bright", "dark")
    cli.main(["extract", str(run), str(pictures), "-o", str(out), "--pooling", "both", "--layers", "2"])
    assert capsys.readouterr().out == f"{out}: 16 x 384 features\n"


def test_probe(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--train", str(pictures), "--val", str(pictures)]
    cli.main(["probe", str(run), *data, "-o", str(tmp_path / "report.json"), "--seed", "5"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["protocol"] == "linear"
    assert report["accuracy"] == 100  # dark and bright
    assert "linear" in printed
    assert "100.0" in printed
    for protocol in ("linear-sgd", "linear-sgd-study-b", "fewshot-5", "retrieval", "cluster"):
        cli.main(["probe", str(run), *data, "--protocol", protocol, "--seed", "5"])
        assert capsys.readouterr().out.startswith(f"{protocol}: 100.0 %")
    assert "classes=3: expected 1 to 2" in refused(capsys, "probe", run, *data, "--classes", "3")
    assert "val=None: expected labelled images" in refused(capsys, "probe", run, *data[:2])
    cli.main(["probe", str(run), *data, "--pooling", "both", "--layers", "2", "-o", str(tmp_path / "both.json")])
    settings = json.loads((tmp_path / "both.json").read_text())["settings"]
    assert (settings["pooling"], settings["layers"]) == ("both", 2)


def test_probe_of_every_checkpoint(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN_TINY_MAE.split(), str(pictures), "--out", str(tmp_path / "run"), "--keep-epochs", "1"]
    cli.main([*words, "--epochs", "2"])
    data = ["--train", str(pictures), "--val", str(pictures), "--every-checkpoint", "--seed", "3"]
    capsys.readouterr()
    cli.main(["probe", str(tmp_path / "run"), *data])
    table, picture = map(Path, capsys.readouterr().out.splitlines())
    assert (table, picture) == (tmp_path / "run" / "probe_curve.csv", tmp_path / "run" / "probe_curve.png")
    names, *rows = (line.split(",") for line in table.read_text().splitlines())
    assert names == ["epoch", "loss", "accuracy", "val_accuracy"]
    kept = Run(tmp_path / "run").kept
    assert [int(row[0]) for row in rows] == list(kept) == [1, 2]
    sources: dict[str, Any] = {"train": pictures, "val": pictures}
    for row, folder in zip(rows, kept.values(), strict=True):
        report = evaluate(load(folder), **sources, seed=3)
        expected = (report.train_loss, report.train_accuracy, report.accuracy)
        assert [float(value) for value in row[1:]] == pytest.approx(expected, rel=1e-5)
    assert rows[0][1] != rows[1][1]
    with Image.open(picture) as image:
        assert min(image.size) > 300
    cli.main(
        [
            "probe",
            str(tmp_path / "run"),
            *data,
            "-o",
            str(tmp_path / "new" / "c.csv"),
            "--protocol",
            "linear-sgd-study-b",
        ]
    )
    assert (tmp_path / "new" / "c.png").is_file()
    assert (tmp_path / "new" / "c.csv").read_text() != table.read_text()
    assert "source" in refused(capsys, "probe", tmp_path / "run", *data[:2], "--every-checkpoint")
    line = refused(capsys, "probe", tmp_path / "run", *data, "--protocol", "resubstitution")
    assert "protocol='resubstitution' is not drawn as a curve" in line


def test_resubstitution_comes_with_a_warning(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warnings.simplefilter("default")  # pytest makes errors of them
    data = ["--train", str(pictures), "--val", str(pictures)]
    cli.main(["probe", str(run), *data, "--protocol", "resubstitution"])
    captured = capsys.readouterr()
    assert "resubstitution" in captured.out
    assert "warning: resubstitution scores a classifier on the images that it was fitted on" in captured.err
    assert ".py" not in captured.err  # where the warning was raised is nobody's business here


def test_knn(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--train", str(pictures), "--val", str(pictures)]
    cli.main(["knn", str(run), *data, "--k", "3", "-o", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text())["protocol"] == "knn-3"
    assert "knn-3" in capsys.readouterr().out
    assert "k=20: expected 1 to 16" in refused(capsys, "knn", run, *data)
    cli.main(["knn", str(run), *data, "--k", "5", "--unweighted", "--metric", "euclidean"])
    assert capsys.readouterr().out.startswith("knn-5-unweighted-euclidean: ")
    cli.main(["knn", str(run), *data, "--k", "5", "--unweighted"])
    assert capsys.readouterr().out.startswith("knn-5-unweighted: ")
    assert "classes=3: expected 1 to 2" in refused(capsys, "knn", run, *data, "--classes", "3")


def test_knn_of_several_k_and_of_one_split(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["knn", str(run), "--train", str(pictures), "--k", "1", "5", "-o", str(tmp_path / "report.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["knn-1-leave-one-out", "knn-5-leave-one-out"]
    kept = [tmp_path / f"report-knn-{k}-leave-one-out.json" for k in (1, 5)]
    assert [json.loads(path.read_text())["settings"]["k"] for path in kept] == [1, 5]


def test_finetune(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--train", str(pictures), "--val", str(pictures), "--device", "cpu"]
    settings = ["--epochs", "2", "--batch-size", "8", "--layer-decay", "0.5", "--time-limit", "0", "--seed", "5"]
    cli.main(["finetune", str(run), *data, *settings, "-o", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert capsys.readouterr().out.startswith("finetune: ")
    assert {name: report["settings"][name] for name in ("epochs", "epochs_done", "batch_size", "layer_decay")} == {
        "epochs": 2,
        "epochs_done": 1,
        "batch_size": 8,
        "layer_decay": 0.5,
    }
    assert report["seed"] == 5
    cli.main(["finetune", str(run), *data, *settings, "--preset", "small-data", "-o", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: report["settings"][name] for name in ("epochs", "ema")} == {"epochs": 2, "ema": 0.99}
    assert "preset='small' is unknown" in refused(capsys, "finetune", run, *data, "--preset", "small")
    assert "batch_size=256: expected at most 16" in refused(capsys, "finetune", run, *data)
    assert "classes=3: expected 1 to 2" in refused(capsys, "finetune", run, *data, "--classes", "3")


@pytest.mark.filterwarnings("default:val. of 3 images")
def test_leaks(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("train/c/0", "train/c/1", "train/d/2", "val/c/1", "val/c/3", "val/d/4")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 24), 40 * number + 1).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "train" / "c" / "1.png", tmp_path / "val" / "c" / "1.png")
    cli.main(["leaks", "--train", str(tmp_path), "--val", str(tmp_path), "--name", str(run), "--count", "1"])
    first, twins, _, nearest = capsys.readouterr().out.splitlines()
    assert first == "1 pairs of equal pixels at 24 px"
    assert [Path(path).name for path in twins.split()] == ["1.png", "1.png"]
    assert nearest == f"{twins}  1.0000"
    cli.main(["knn", str(run), "--train", str(tmp_path), "--val", str(tmp_path), "--k", "1"])
    assert "warning: val: of 3 images, 1 are in train too" in capsys.readouterr().err


def test_reconstruct(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted(map(str, (pictures / "train" / "dark").iterdir()))[:2]
    out = tmp_path / "out.png"
    cli.main(["reconstruct", str(run), *images, "-o", str(out), "--mask-ratio", "0.5"])
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.height > 200


def test_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plot", str(run), "-o", str(tmp_path / "curves.svg")])
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    cli.main(["plot", str(run)])
    assert (run / "curves.png").stat().st_size > 1000
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "curves.png")


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    monkeypatch.setattr("vision_ssl.demo.demo", folders.append)
    cli.main(["demo"])
    cli.main(["demo", "-o", "elsewhere"])
    assert folders == [Path("demo"), Path("elsewhere")]


def test_list_of_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "WEIGHTS", ())
    monkeypatch.setattr(commands, "UPSTREAM", ())
    cli.main(["list"])
    assert capsys.readouterr().out == "name  linear  kNN\n"


def test_list_of_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [
        {"data": "photos", "protocol": "linear", "accuracy": 31.26},
        {"data": "photos", "protocol": "knn-20", "accuracy": 5.0},
        {"data": "digits", "protocol": "linear", "accuracy": 99.0},  # not what it was pretrained on
    ]
    cards = {
        "mae_vit.one": {"data": {"name": "photos/train"}, "scores": scores},
        "simclr.two": {"data": {"name": "more"}, "scores": scores},
    }
    for name, card in cards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"vision_ssl": card}))
    weights = tuple(Weights(name, f"this is {name}", {}) for name in cards)
    monkeypatch.setattr(registry, "PACKAGED", tmp_path)
    monkeypatch.setattr(registry, "WEIGHTS", weights)
    monkeypatch.setattr(commands, "WEIGHTS", weights)
    monkeypatch.setattr(commands, "UPSTREAM", ())
    cli.main(["list"])
    assert capsys.readouterr().out.splitlines() == [
        "name         linear  kNN",
        "mae_vit.one  31.3 %  5.0 %  this is mae_vit.one",
        "simclr.two   -       -      this is simclr.two",
    ]
    cli.main(["info", "mae_vit"])
    assert json.loads(capsys.readouterr().out) == cards["mae_vit.one"]


def test_light_commands_do_not_wait_for_torch() -> None:
    code = """
import sys
from vision_ssl.cli import main
main(["list"])
try:
    main(["train", "mae", "--help"])
except SystemExit as leaving:
    assert leaving.code == 0
assert not {"torch", "timm", "matplotlib", "PIL"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("name")


def test_a_process_that_fails_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vision_ssl", "plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: run={str(tmp_path)!r} has no metrics.jsonl: expected the directory of a run\n"


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_can_be_named(asked: list[tuple[Recipe, Any, RunOptions]], method: str) -> None:
    for preset in PRESETS[method]:
        cli.main(["train", method, "photos", "--preset", preset])
        cli.main(["train", method, f"--preset={preset}", "photos", "--epochs", "3"])
        expected = METHODS[method].preset(preset)
        assert asked == [
            (expected, "photos", RunOptions()),
            (replace(expected, epochs=3), "photos", RunOptions()),
        ]
        asked.clear()


def test_every_field_is_an_option(asked: list[tuple[Recipe, Any, RunOptions]]) -> None:
    words = (
        "train simclr photos --encoder resnet34 --stem 3x3-nopool --crop-scale 0.1 0.9 --jitter 0.1 0.2 0.3 0.4 "
        "--clip-grad 1.5 --no-projector-norm --warmup-epochs 2 --blur-kernel 5 --out here --init there --parts a b "
        "--time-limit 1.5 --seed 3 --no-resume --precision bf16 --look-epochs 0 --keep-epochs 4 "
        "--cache-dir c --cache-size 72"
    )
    cli.main(words.split())
    recipe = SimCLR(
        encoder="resnet34",
        stem="3x3-nopool",
        crop_scale=(0.1, 0.9),
        jitter=(0.1, 0.2, 0.3, 0.4),
        clip_grad=1.5,
        projector_norm=False,
        warmup_epochs=2,
        blur_kernel=5,
    )
    assert asked[0][0] == recipe
    assert asked[0][2] == RunOptions(
        out="here",
        init="there",
        parts=("a", "b"),
        time_limit=1.5,
        seed=3,
        precision="bf16",
        look_epochs=0,
        keep_epochs=4,
        cache_dir="c",
        cache_size=72,
    )


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("train", "simclr"), ("train", "mae")])
def test_help(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([*command, "--help"])
    assert leaving.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"usage: {' '.join(('vision-ssl', *command))} ")
    if not command:
        assert all(name in captured.out for name in COMMANDS)
    if len(command) == 2:
        for option in ("--preset", "--encoder", "--batch-size", "--resume", "--time-limit"):
            assert option in captured.out
        assert "Learning rate per 256 images" in captured.out  # fields bring their descriptions


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lisst"], "lisst"),
        (["list", "--verbose"], "--verbose"),
        (["train", "simclr"], "PATH"),
        (["train", "dino", "photos"], "dino"),
        (["train", "mae", "photos", "--temperature", "0.1"], "--temperature"),
        (["train", "mae", "photos", "--epoch", "three"], "--epoch"),
        (["train", "mae", "photos", "--epochs", "three"], "three"),
        (["train", "mae", "photos", "--schedule", "linear"], "linear"),
        (["train", "mae", "photos", "--preset"], "--preset"),
        (["extract", "x", "photos"], "--out"),
        (["knn", "x", "--val", "photos"], "--train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_that_cannot_be_understood(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert named in misunderstood(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("info nowhere", "'nowhere' is neither a known model nor a path"),
        ("extract nowhere photos -o x", "'nowhere' is neither a known model nor a path"),
        ("probe nowhere --train a --val b", "'nowhere' is neither a known model nor a path"),
        ("knn nowhere --train a --val b", "'nowhere' is neither a known model nor a path"),
        ("finetune nowhere --train a --val b", "'nowhere' is neither a known model nor a path"),
        ("reconstruct nowhere PICTURE -o x.png", "'nowhere' is neither a known model nor a path"),
        ("reconstruct RUN missing.png -o x.png", "No such file or directory: .*missing.png"),
        ("reconstruct RUN PICTURE -o x.png --mask-ratio 2", "mask_ratio=2.0 is out of range"),
        ("reconstruct RUN -o x.png", "images: got none"),
        ("plot nowhere", "run='nowhere' has no metrics.jsonl"),
        ("plot RUN -o RUN/run.json/x.png", "Not a directory|File exists"),
        ("extract RUN missing -o x", "source 'missing': neither a folder"),
        ("extract RUN PICTURE -o x", "looked for a folder of images, found a file"),
        ("extract RUN PICTURES -o x --batch-size 0", "batch_size=0: expected at least 1"),
        ("extract RUN PICTURES -o x --device tpu", "device='tpu' cannot be used here"),
        ("extract RUN PICTURES -o RUN/run.json/x", "cannot write .*run.json/x"),
        ("probe RUN --train PICTURES/train/dark --val PICTURES", "looked for labels"),
        ("probe RUN --train PICTURES --val PICTURES --every-checkpoint", "kept no encoder: expected epochs/0005 and"),
        ("probe simclr_resnet18 --train a --val b --every-checkpoint", "run='simclr_resnet18' kept no encoder"),
        ("train mae PICTURES --preset best", "preset='best' is unknown to mae: expected one of small-64, small-32, st"),
        ("train mae PICTURES --preset study-b --out x", "preset='study-b' is unknown to mae"),
        ("train mae PICTURES --mask-ratio 1.5 --out x", "mask_ratio=1.5 is out of range"),
        ("train mae PICTURES --encoder vit_tny --out x", "did you mean 'vit_tiny'?"),
        ("train mae PICTURES --out x", "batch_size=512 is larger than the data set of 16 images"),
        ("train mae PICTURES --out RUN", "holds a run already"),
        ("train mae missing --out x", "source 'missing': neither a folder"),
        ("train simclr PICTURES --out RUN --resume", "is a run of mae, and cannot go on as simclr"),
        ("train mae PICTURES --out x --resume", "x is not a run"),
    ],
)
def test_errors_are_one_line(
    run: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run, "PICTURES": pictures, "PICTURE": next((pictures / "val" / "dark").iterdir())}
    words = []
    for word in arguments.split():
        first, slash, rest = word.partition("/")
        words.append(f"{places.get(first, first)}{slash}{rest}")
    line = refused(capsys, *words)
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_is_cut_off(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = next((pictures / "val" / "dark").iterdir()).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    refused(capsys, "reconstruct", run, tmp_path / "half.png", "-o", tmp_path / "x.png")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "error: [Errno 28] No space left on device: 'x'"),
        (KeyboardInterrupt(), "error: interrupted"),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_what_happens_to_us_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, line: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("vision_ssl.pretrain.pretrain", fail)
    assert refused(capsys, "train", "mae", "photos") == line


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("vision_ssl.pretrain.pretrain", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "mae", "photos"])
