import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

import vision_ssl
from vision_ssl import evaluate, extract, hub, storage
from vision_ssl.cli import main
from vision_ssl.data import ImageSet, open_images
from vision_ssl.encoders import resolve_encoder
from vision_ssl.errors import CheckpointError, DataError, RecipeError, TrainingError, VisionSSLError, WeightsError
from vision_ssl.options import Protocol
from vision_ssl.pretrain import Run
from vision_ssl.recipes import MAE, Recipe, SimCLR
from vision_ssl.spread import effective_rank
from vision_ssl.storage import load_tensors

PIXELS = torch.randint(0, 256, (24, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"encoder": "vit_tiny", "image_size": 24, "patch_size": 8, "batch_size": 8, "epochs": 2}
MAE_RECIPE = MAE(**SMALL, decoder_dim=16, decoder_depth=1, decoder_heads=2)
# Without BatchNorm, whose statistics are those of one process on CPUs.
SIMCLR_RECIPE = SimCLR(**SMALL, projector_hidden=16, projector_dim=8, projector_norm=False)
STEPS = 6


def train(recipe: Recipe, out: Path, source: Any = PIXELS, **options: Any) -> Run:
    # float32 gives the same numbers on every machine
    return recipe.train(source, out=out, **({"device": "cpu", "precision": "fp32"} | options))


def checkpoint(run: Run) -> dict[str, Tensor]:
    return load_tensors(run.directory / "checkpoint.safetensors")[0]


def weights(run: Run) -> dict[str, Tensor]:
    return load_tensors(run.directory / "weights" / "model.safetensors")[0]


def losses(run: Run) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in run.metrics if "loss" in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def labelled(labels: list[int]) -> ImageSet:
    classes = tuple(f"class {label}" for label in range(max(labels) + 1))
    return replace(open_images(PIXELS, size=24), labels=torch.tensor(labels), classes=classes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(MAE_RECIPE, tmp_path_factory.mktemp("runs") / "mae")


@pytest.mark.parametrize("recipe", [MAE_RECIPE, replace(SIMCLR_RECIPE, accumulate=2)], ids=["MAE", "SimCLR"])
def test_stopped_twice_and_resumed_equals_uninterrupted(tmp_path: Path, recipe: Recipe) -> None:
    whole = train(recipe, tmp_path / "whole", seed=3)
    train(recipe, tmp_path / "parts", seed=3, time_limit=0)
    stopped = train(recipe, tmp_path / "parts", resume=True, time_limit=0)  # the run itself remembers its seed
    assert hub.read_card(stopped.directory)["training"]["steps"] == 2  # of three in the first epoch
    parts = train(recipe, tmp_path / "parts", resume=True)
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == STEPS
    assert_same(checkpoint(parts), checkpoint(whole))
    assert_same(weights(parts), weights(whole))
    other_seed = train(recipe, tmp_path / "other", seed=4, time_limit=0)
    assert losses(other_seed)[0] != losses(whole)[0]


def test_a_run_that_died_before_its_first_checkpoint_can_be_resumed(
    tmp_path: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(*_: object, **__: object) -> None:
        raise RuntimeError("no power")

    with monkeypatch.context() as patch:
        patch.setattr("vision_ssl.engine.Trainer.fit", power_cut)
        with pytest.raises(RuntimeError, match="no power"):
            train(MAE_RECIPE, tmp_path / "run")
    assert_same(weights(train(MAE_RECIPE, tmp_path / "run", resume=True)), weights(finished))


def test_the_printed_command_goes_on(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own
    options: dict[str, Any] = {"seed": 7, "cache_size": 30, "look_epochs": 0, "cache_dir": tmp_path / "cache"}
    whole = train(MAE_RECIPE, tmp_path / "whole", photos, **options)
    stopped = train(MAE_RECIPE, tmp_path / "out of spaces", photos, **options, time_limit=0)
    *_, announcement, command = capsys.readouterr().err.splitlines()
    assert announcement == "stopped at step 1 of 6; to go on:"
    program, *arguments = shlex.split(command)
    assert program == "vision-ssl"
    main(arguments)
    assert losses(stopped) == losses(whole)
    assert_same(weights(stopped), weights(whole))


def test_without_a_path_the_way_to_go_on_is_pythons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(MAE_RECIPE, tmp_path / "run", time_limit=0)
    last = capsys.readouterr().err.splitlines()[-1].strip()
    assert last == f"MAE.train(the same images, device='cpu', out='{tmp_path}/run', resume=True)"


def test_a_signal_stops_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MAE.augment

    def augment(self: MAE, *args: Any) -> tuple[Tensor, ...]:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # that the estimate before the first step does not notice
    try:
        monkeypatch.setattr(MAE, "augment", augment)
        run = train(MAE_RECIPE, tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [step for step, _ in losses(run)] == [1]
    training = run.encoder.card["training"]
    assert (training["steps"], training["finished"], training["epochs"]) == (1, False, 1 / 3)


def test_a_run_describes_itself(finished: Run) -> None:
    assert sorted(path.name for path in finished.directory.iterdir()) == [
        "checkpoint.safetensors",
        "metrics.jsonl",
        "run.json",
        "weights",
    ]
    recipe = json.loads(json.dumps(MAE_RECIPE.to_dict()))
    assert finished.settings == {
        "recipe": recipe,
        "source": "Tensor",
        "options": {"init": None, "precision": "fp32", "compile": "auto", "seed": 0, "parts": None, "cache_size": None},
    }
    card = finished.encoder.card
    assert (card["method"], card["recipe"]) == ("mae", recipe)
    assert card["data"]["images"] == 24
    assert card["data"]["digest"] == open_images(PIXELS, size=24).digest
    training = card["training"]
    assert {name: training[name] for name in ("epochs", "steps", "finished", "precision", "seed", "init")} == {
        "epochs": 2,
        "steps": STEPS,
        "finished": True,
        "precision": "fp32",
        "seed": 0,
        "init": None,
    }
    assert training["torch"] == torch.__version__
    assert training["vision_ssl"] == vision_ssl.__version__
    assert training["minutes"] >= 0
    assert "thread(s)" in training["hardware"]
    assert "commit" in training


def test_encoders_are_kept_whenever_a_run_is_stopped_and_resumed(tmp_path: Path, finished: Run) -> None:
    recipe = replace(MAE_RECIPE, epochs=3)
    whole = train(recipe, tmp_path / "whole", keep_epochs=2)
    assert list(whole.kept) == [2, 3]  # every second one, and the last
    for options in ({}, *[{"resume": True}] * 8):
        parts = train(recipe, tmp_path / "parts", keep_epochs=2, time_limit=0, **options)
    assert parts.encoder.card["training"]["finished"]
    assert sorted(contents(parts.directory)) == sorted(contents(whole.directory))
    for epoch, folder in whole.kept.items():
        assert folder == whole.directory / "epochs" / f"{epoch:04d}"
        file = "model.safetensors"
        assert_same(load_tensors(folder / file)[0], load_tensors(parts.kept[epoch] / file)[0])
        assert hub.read_card(folder)["training"]["epochs"] == epoch
    assert_same(load_tensors(whole.kept[3] / "model.safetensors")[0], weights(whole))
    assert hub.load(whole.kept[2])(torch.zeros(1, 3, 24, 24)).shape == (1, 192)
    assert finished.kept == {}


def test_the_exported_encoder_is_the_trained_one(finished: Run) -> None:
    encoder = finished.encoder
    assert finished.encoder is encoder
    trained = {
        name.removeprefix("model.encoder."): tensor
        for name, tensor in checkpoint(finished).items()
        if name.startswith("model.encoder.")
    }
    exported = encoder.state_dict()
    assert exported.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(exported[name], tensor.half().float()), name
    assert not encoder.training
    assert encoder(encoder.preprocess.normalise(PIXELS[:2])).shape == (2, 192)


def poisoned(self: MAE, images: Tensor, draws: Any) -> tuple[Tensor, Tensor]:
    return torch.full(images.shape, float("nan")), draws.uniform(9)


def test_nothing_is_exported_over_good_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(MAE_RECIPE, tmp_path / "run", time_limit=0)
    before = contents(run.directory)
    monkeypatch.setattr(MAE, "augment", poisoned)
    with pytest.raises(TrainingError, match=r"^the loss is nan at step 2, with learning rate 1\.56e-05: "):
        train(MAE_RECIPE, tmp_path / "run", resume=True)
    assert contents(run.directory) == before
    monkeypatch.undo()
    assert len(losses(train(MAE_RECIPE, tmp_path / "run", resume=True))) == STEPS


@pytest.mark.parametrize("file", ["checkpoint.safetensors", "model.safetensors"])
def test_a_full_disk_is_reported_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def full(tensors: Any, path: Path, **settings: Any) -> None:
        if file in path.name:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **settings)

    run = train(MAE_RECIPE, tmp_path / "run", time_limit=0)
    before = contents(run.directory)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(CheckpointError, match=rf"^cannot write .*{file}: .*No space left on device"):
            train(MAE_RECIPE, tmp_path / "run", resume=True)
    after = contents(run.directory)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"metrics.jsonl"} | ({"checkpoint.safetensors"} if file == "model.safetensors" else set())
    train(MAE_RECIPE, tmp_path / "run", resume=True)
    assert run.encoder.card["training"]["finished"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 100}, "batch_size=100 is larger than the data set of 24 images: the nearest valid is 24"),
        ({"batch_size": 9, "accumulate": 2}, "batch_size=9 is not divisible by accumulate=2: the nearest valid is 8"),
        ({"patch_size": 7}, "image_size=24 is not divisible by patch_size=7: the nearest valid is 21"),
        ({"encoder": "resnet18", "patch_size": 7}, "image_size=24 is not divisible by patch_size=7"),
        ({"channels": 1}, "channels=1 does not fit: the images have 3 channels"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 is out of range: .* between 0 and 1"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0 is out of range"),
        ({"mask_ration": 0.5}, "MAE has no field mask_ration: did you mean mask_ratio?"),
        ({"encoder": "vit_tny"}, "encoder='vit_tny' is unknown: did you mean 'vit_tiny'?"),
        ({"schedule": "cosin"}, "schedule='cosin' is unknown: expected one of cosine, constant"),
        ({"precision": "fp16"}, "precision='fp16' is unknown: expected one of auto, bf16, fp32"),
        ({"decoder_heads": 0}, "decoder_heads=0 is too small"),
        ({"patch_size": -8}, "patch_size=-8 is too small"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) is out of range"),
        ({"clip_grad": 0.0}, "clip_grad=0.0 is out of range"),
        ({"device": "tpu"}, "device='tpu' cannot be used here"),
        ({"init": "nowhere"}, "'nowhere' is neither a known model nor a path"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    given = {**SMALL, "decoder_dim": 16, "decoder_heads": 2, "out": tmp_path / "run", "device": "cpu", **settings}
    with pytest.raises(VisionSSLError, match=message) as refusal:
        MAE.train(PIXELS, **given)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_cannot_be_built_decodes_nothing(tmp_path: Path, photos: Path) -> None:
    recipe = MAE(encoder="resnet18", image_size=24, patch_size=7)
    with pytest.raises(RecipeError, match="not divisible by patch_size=7"):
        train(recipe, tmp_path / "run", photos, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder"):
        train(MAE_RECIPE, tmp_path / "run", tmp_path / "photos")
    assert not (tmp_path / "run").exists()


def test_an_instance_trains_with_its_own_fields(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\(\) got mask_ratio: a recipe instance trains with its own fields"):
        train(MAE_RECIPE, tmp_path / "run", mask_ratio=0.5)


def test_a_second_run_does_not_overwrite_the_first(finished: Run) -> None:
    before = contents(finished.directory)
    with pytest.raises(CheckpointError, match=r"holds a run already: expected a new directory, or resume=True"):
        train(MAE_RECIPE, finished.directory)
    assert contents(finished.directory) == before


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (SIMCLR_RECIPE, {}, "is a run of mae, and cannot go on as simclr"),
        (replace(MAE_RECIPE, mask_ratio=0.5), {}, "was started with mask_ratio=0.75, and cannot go on with 0.5"),
        (MAE_RECIPE, {"seed": 1}, "was started with seed=0, and cannot go on with 1"),
        (MAE_RECIPE, {"precision": "bf16"}, "was started with precision='fp32', and cannot go on with 'bf16'"),
        (MAE_RECIPE, {"source": 255 - PIXELS}, "checkpoint.safetensors has another images"),
    ],
)
def test_another_run_cannot_go_on_here(finished: Run, recipe: Recipe, options: dict[str, Any], message: str) -> None:
    before = contents(finished.directory)
    with pytest.raises(CheckpointError, match=message):
        train(recipe, finished.directory, **options, resume=True)
    assert contents(finished.directory) == before


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"recipe": 5}', '{"recipe": {"method": "mea"}}', '{"recipe": {"method": "mae", "epochs": "x"}}'],
)
def test_a_damaged_description_of_a_run(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run: expected run.json in it"):
        train(MAE_RECIPE, tmp_path, resume=True)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(VisionSSLError, match=r"is damaged|is unknown|is not the description|is not a count") as refusal:
        train(MAE_RECIPE, tmp_path, resume=True)
    assert "\n" not in str(refusal.value)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    run = train(MAE_RECIPE, tmp_path / "run", time_limit=0)
    path = run.directory / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged or not a safetensors file"):
        train(MAE_RECIPE, run.directory, resume=True)


def test_training_goes_on_from_the_weights_of_another_run(tmp_path: Path, finished: Run) -> None:
    before = Run(Path(shutil.copytree(finished.directory, tmp_path / "before")))
    still = replace(MAE_RECIPE, base_lr=0.0, epochs=1)  # changes nothing: what comes out is what came in
    run = train(still, tmp_path / "run", init=before.directory, time_limit=0)
    assert_same(weights(run), weights(finished))
    heads = [load_tensors(each.directory / "weights" / "head.safetensors")[0] for each in (run, finished)]
    assert_same(*heads)
    card, of_before = run.encoder.card, before.encoder.card
    assert card["training"]["init"] == str(before.directory)
    assert card["origin"] == {
        "name": str(before.directory),
        "data": of_before["data"]["name"],
        "epochs": of_before["training"]["epochs"],
        "minutes": of_before["training"]["minutes"],
    }
    shutil.rmtree(before.directory)
    assert train(still, run.directory, resume=True).encoder.card["origin"] == card["origin"]
    fresh = train(still, tmp_path / "fresh", time_limit=0)
    assert "origin" not in fresh.encoder.card
    assert not torch.equal(weights(fresh)["cls_token"], weights(finished)["cls_token"])


def test_a_head_of_another_method_is_left_out(tmp_path: Path, finished: Run) -> None:
    run = train(replace(SIMCLR_RECIPE, base_lr=0.0), tmp_path / "run", init=str(finished.directory), time_limit=0)
    assert_same(weights(run), weights(finished))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet18", "stem": "3x3"}, "holds a vit_tiny_patch16_224: expected resnet18_3x3, as encoder"),
        ({"patch_size": 12}, r"does not fit VisionTransformer: 'pos_embed' is \(1, 10, 192\), expected \(1, 5, 192\)"),
    ],
)
def test_weights_of_another_architecture_are_refused(
    tmp_path: Path, finished: Run, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message) as refusal:
        train(replace(MAE_RECIPE, **changes), tmp_path / "run", init=finished.directory)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_small_stems_are_not_taken_for_each_other(tmp_path: Path) -> None:
    spec = resolve_encoder("resnet18", image_size=24, stem="3x3-nopool")
    hub.save(tmp_path / "weights", spec.build(), spec, card={})
    recipe = SimCLR(encoder="resnet18", image_size=24, stem="3x3", batch_size=8, epochs=1)
    with pytest.raises(WeightsError, match="holds a resnet18_3x3_nopool: expected resnet18_3x3, as encoder and stem"):
        train(recipe, tmp_path / "run", init=tmp_path / "weights")


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("recipe", [MAE_RECIPE, SIMCLR_RECIPE], ids=["MAE", "SimCLR"])
def test_any_number_of_channels(tmp_path: Path, recipe: Recipe, channels: int) -> None:
    pixels = PIXELS[:8].repeat(1, 2, 1, 1)[:, :channels]
    run = train(replace(recipe, channels=channels, epochs=1), tmp_path / "run", pixels)
    assert len(run.metrics) == 1
    encoder = run.encoder
    assert encoder(encoder.preprocess.normalise(pixels)).shape == (8, 192)


def test_a_resnet_trains(tmp_path: Path) -> None:
    recipe = SimCLR(encoder="resnet18", image_size=24, batch_size=4, epochs=1)
    run = train(recipe, tmp_path / "run", PIXELS[:4], precision="bf16")
    assert len(run.metrics) == 1
    assert run.encoder.card["training"]["precision"] == "bf16"
    assert run.encoder(torch.zeros(1, 3, 24, 24)).shape == (1, 512)


def test_what_was_resolved_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(MAE_RECIPE, base_lr=0.016, accumulate=2, warmup_epochs=0.5)
    train(recipe, tmp_path / "run", labelled([0, 1] * 12), time_limit=0, look_epochs=0)
    announced = {line[:9].strip(): line[11:] for line in capsys.readouterr().err.splitlines()}
    assert announced["images"] == "array: 24, 2 classes, kept at 24 px"
    assert announced["encoder"] == "vit_tiny, patches of 8 px, at 24 px: 5.4 M parameters, and 0.0 M in the head"
    assert announced["steps"] == "6 in 2 epochs of 3"
    assert announced["batch"] == "8 images: 1 process(es) x 2 micro-batch(es) of 4"
    assert announced["learning"] == (
        "adamw, learning rate 0.0005 = 0.016 x 8 / 256; linear for 0.5 epochs, then cosine"
    )
    assert announced["device"] == "cpu, fp32"
    assert re.fullmatch(r"\d+\.\d minutes, at \d+\.\d\d s a step(; \d+\.\d GiB of memory)?", announced["estimate"])
    assert announced["out"] == str(tmp_path / "run")
    assert "warning" not in announced


def test_the_estimate_of_a_compiled_run_says_that_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **_: None)  # which would take a minute
    train(MAE_RECIPE, tmp_path / "run", PIXELS, compile="on", time_limit=0, look_epochs=0)
    assert "s a step, less once it is compiled" in capsys.readouterr().err


def test_a_resumed_run_announces_what_is_done(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    train(MAE_RECIPE, finished.directory, resume=True)
    assert "6 in 2 epochs of 3, of which 6 are done" in capsys.readouterr().err


def test_choices_that_hurt_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = SimCLR(encoder="resnet18", image_size=32, stem="7x7", batch_size=4, epochs=1)
    train(recipe, tmp_path / "run", PIXELS[:4].repeat(1, 1, 2, 2)[:, :, :32, :32])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.strip().startswith("warning")]
    assert notes == [
        "  warning  stem='7x7' shrinks 32 px images to 1 px maps: '3x3-nopool' is usual at 32 px",
        "  warning  each image is contrasted with 3 others (batch_size / accumulate): below 64 the features suffer",
    ]


def test_looks_leave_training_alone(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISION_SSL_CACHE", str(tmp_path / "default"))
    options = {"cache_dir": tmp_path / "cache", "cache_size": 30}
    watched = train(MAE_RECIPE, tmp_path / "watched", photos, look_epochs=1, **options)
    alone = train(MAE_RECIPE, tmp_path / "alone", photos, look_epochs=0, **options)
    looks = [line for line in watched.metrics if "loss" not in line]
    assert [line["step"] for line in looks] == [3, 6]
    assert all(0 <= line[name] <= 100 for line in looks for name in ("knn_accuracy", "linear_accuracy"))
    assert all("loss" in line for line in alone.metrics)
    assert losses(watched) == losses(alone)
    assert_same(checkpoint(watched), checkpoint(alone))
    assert not (tmp_path / "default").exists()


def test_a_look_tells_classes_apart(tmp_path: Path) -> None:
    labels = [0, 1] * 12
    bright = 200 * torch.tensor(labels, dtype=torch.uint8)[:, None, None, None] + PIXELS // 8
    source = replace(labelled(labels), pixels=bright)
    run = train(replace(MAE_RECIPE, epochs=1), tmp_path / "run", source, look_epochs=1)
    assert run.metrics[-1]["knn_accuracy"] == run.metrics[-1]["linear_accuracy"] == 100


PROTOCOLS: tuple[Protocol, ...] = ("knn", "linear")


def test_the_last_look_agrees_with_probes_of_the_exported_encoder(tmp_path: Path) -> None:
    images = open_images("fashion-mnist-mini", size=24, cache_dir=tmp_path / "cache")
    run = train(replace(MAE_RECIPE, epochs=1, batch_size=500), tmp_path / "run", images, seed=3, look_epochs=1)
    last = run.metrics[-1]
    sample = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    known, asked = images.select(sample[:800]), images.select(sample[800:])
    for protocol in PROTOCOLS:
        report = evaluate(run.encoder, train=known, val=asked, protocol=protocol, seed=3)
        assert report.accuracy == pytest.approx(last[f"{protocol}_accuracy"], abs=0.5)  # of one image in 200
    assert last["knn_accuracy"] != last["linear_accuracy"]
    rank = effective_rank(extract(run.encoder, known).features)
    assert last["effective_rank"] == pytest.approx(rank, rel=1e-3)


def test_a_look_at_images_without_labels(tmp_path: Path) -> None:
    many = PIXELS.repeat(6, 1, 1, 1)
    run = train(replace(MAE_RECIPE, epochs=1, batch_size=72), tmp_path / "run", many, look_epochs=1)
    assert run.metrics[-1].keys() == {"step", "epoch", "effective_rank"}


def test_a_verdict_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = PIXELS[:1].expand(24, -1, -1, -1)  # views of one image attract and repel at once
    recipe = replace(SIMCLR_RECIPE, base_lr=0.0, crop_scale=(1.0, 1.0), flip=0.0, jitter_probability=0.0, grayscale=0.0)
    train(recipe, tmp_path / "run", same)
    said = capsys.readouterr().err
    assert "     loss  2.708 by chance, 0.045 at best\n" in said
    assert said.endswith("  verdict  collapsed at epoch 1: the projections of all images are alike (uniformity 0.00)\n")


@pytest.mark.parametrize(
    ("labels", "measured"),
    [([0] * 24, set()), (list(range(24)), {"knn_accuracy"})],
    ids=["a single class", "classes of one image, most of which are either index or query"],
)
def test_labels_of_little_use_do_not_stop_a_run(tmp_path: Path, labels: list[int], measured: set[str]) -> None:
    run = train(replace(MAE_RECIPE, epochs=1), tmp_path / "run", labelled(labels), look_epochs=1)
    looks = [line.keys() - {"step", "epoch"} for line in run.metrics if "loss" not in line]
    assert looks == ([measured] if measured else [])


PROCESSES = 2


def in_two_processes(number: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
    }

    def place(name: str, port: int) -> Path:
        os.environ["MASTER_PORT"] = str(port)
        return folder / name / f"of process {number}"  # the same for all in real life: here we see who writes

    source = labelled([0, 1] * 12)
    train(MAE_RECIPE, place("mae", ports[0]), source, save_minutes=0, look_epochs=1)
    train(SIMCLR_RECIPE, place("simclr", ports[1]), look_epochs=0)

    original, calls = MAE.augment, iter(range(9))

    def augment(self: MAE, *args: Any) -> tuple[Tensor, ...]:
        if number == 1 and next(calls) == 2:  # the estimate takes the first two
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    MAE.augment = augment  # type: ignore[assignment, method-assign]  # this process ends here
    train(MAE_RECIPE, place("stopped", ports[2]))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    start_processes(in_two_processes, (folder, [free_port() for _ in range(3)]), nprocs=PROCESSES, start_method="spawn")
    return folder


@pytest.mark.parametrize("recipe", [MAE_RECIPE, SIMCLR_RECIPE], ids=["mae", "simclr"])
def test_two_processes_learn_as_one(tmp_path: Path, shared_runs: Path, recipe: Recipe) -> None:
    alone = train(recipe, tmp_path / "alone")
    together = Run(shared_runs / recipe.method / "of process 0")
    assert [step for step, _ in losses(together)] == [step for step, _ in losses(alone)]
    assert [loss for _, loss in losses(together)] == pytest.approx([loss for _, loss in losses(alone)], rel=1e-4)


def test_only_the_first_process_writes(shared_runs: Path) -> None:
    for name in ("mae", "simclr", "stopped"):
        assert [path.name for path in (shared_runs / name).iterdir()] == ["of process 0"]
        assert Run(shared_runs / name / "of process 0").encoder.card["training"]["steps"] > 0
    looks = [line for line in Run(shared_runs / "mae" / "of process 0").metrics if "knn_accuracy" in line]
    assert len(looks) == 2


def test_a_signal_to_one_process_stops_all(shared_runs: Path) -> None:
    run = Run(shared_runs / "stopped" / "of process 0")
    assert [step for step, _ in losses(run)] == [1]
    assert not run.encoder.card["training"]["finished"]
