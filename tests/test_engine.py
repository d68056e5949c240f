import errno
import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_ssl import storage
from vision_ssl.augment import Draws
from vision_ssl.device import constant, fastest_convolutions, native_bf16, pick_device
from vision_ssl.engine import Metrics, Trainer
from vision_ssl.errors import CheckpointError, RecipeError, TrainingError
from vision_ssl.optim import schedule_factor
from vision_ssl.recipes import MAE, Optimiser, Recipe
from vision_ssl.storage import load_tensors

CPU = torch.device("cpu")
IMAGES = 18  # in batches of 4: two are left over in each epoch
PIXELS = torch.randint(0, 256, (IMAGES, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PIXELS[:, 0, 0, 0] = torch.arange(IMAGES)  # a number to recognise each image by


def nothing(images: Tensor) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Tiny(Recipe):
    method: ClassVar[str] = "tiny"

    encoder: str = "tiny"
    epochs: int = 2
    batch_size: int = 4
    optimizer: Optimiser = "sgd"
    base_lr: float = 1.0
    weight_decay: float = 0.01
    on_batch: Callable[[Tensor], None] = field(default=nothing)

    def augment(self, images: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        self.on_batch(images)
        return (images / 255 + 0.1 * draws.uniform(*images.shape[1:]),)


class TinyModel(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=3, padding=1, bias=False),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.GELU(),
            nn.Conv2d(4, 4, 2),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.encoder(images).flatten(1)
        loss = (self.head(features) - images.mean(dim=(2, 3))[:, :2]).square().mean()
        return loss, {"size": features.detach().abs().mean()}


def make(directory: Path, recipe: Recipe, *, norm: bool = True, seed: int = 0, pixels: Tensor = PIXELS) -> Trainer:
    directory.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    facts = {"images": "digest"}
    return Trainer(TinyModel(norm), recipe, pixels, directory, device=CPU, bf16=False, seed=seed, facts=facts)


def fit(
    trainer: Trainer,
    *,
    monitor: Callable[[nn.Module], dict[str, float]] | None = None,
    monitor_epochs: int = 1,
    keep: Callable[[int], None] = lambda epoch: None,
    keep_epochs: int = 0,
    time_limit: float | None = None,
    save_minutes: float = 10,
) -> Trainer:
    trainer.fit(
        monitor=monitor,
        monitor_epochs=monitor_epochs,
        keep=keep,
        keep_epochs=keep_epochs,
        time_limit=time_limit,
        save_minutes=save_minutes,
    )
    return trainer


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["lr"], line["loss"]) for line in lines(directory)]


def state(directory: Path) -> dict[str, Tensor]:
    return load_tensors(directory / "checkpoint.safetensors")[0]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def at_batch(number: int, action: Callable[[], None]) -> Callable[[Tensor], None]:
    """Do something when the augmentation is called for the n-th time, counted from 1."""
    calls = iter(range(1, 1000))

    def on_batch(images: Tensor) -> None:
        if next(calls) == number:
            action()

    return on_batch


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def signal_handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["lars", "adamw", "adam", "sgd"])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: Optimiser, accumulate: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = Tiny(optimizer=optimizer, accumulate=accumulate, clip_grad=0.5)
    fit(make(whole, recipe))
    for step in (3, 6):  # both within an epoch of four steps
        interrupted = at_batch((step - 1) % 3 * accumulate + 1, send(signal.SIGTERM))
        trainer = make(parts, replace(recipe, on_batch=interrupted))
        if step > 3:
            trainer.resume()
        assert fit(trainer).progress.step == step
    last = make(parts, recipe, seed=0)
    last.resume()
    assert fit(last).progress.finished
    assert losses(parts) == losses(whole)
    assert [line["step"] for line in lines(whole)] == list(range(1, 9))
    assert_same(state(parts), state(whole))
    assert any(name.startswith("optimizer.") for name in state(whole))


def test_what_came_after_the_last_checkpoint_is_done_again(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def monitor(model: nn.Module) -> dict[str, float]:
        return {"knn_accuracy": 50.0}

    fit(make(whole, Tiny()), monitor=monitor)

    def power_cut() -> None:
        raise RuntimeError("no power")

    trainer = make(parts, Tiny(on_batch=at_batch(6, power_cut)))
    with pytest.raises(RuntimeError, match="no power"):
        fit(trainer, save_minutes=0, monitor=monitor)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')  # written, but by no checkpoint remembered
    trainer = make(parts, Tiny())
    trainer.resume()
    assert trainer.progress.step == 5
    fit(trainer, monitor=monitor)
    assert [line["step"] for line in lines(parts)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [line.get("loss") for line in lines(parts)] == [line.get("loss") for line in lines(whole)]
    assert_same(state(parts), state(whole))


def test_a_finished_run_can_be_resumed_and_nothing_changes(tmp_path: Path) -> None:
    fit(make(tmp_path, Tiny()))
    before, metrics = state(tmp_path), lines(tmp_path)
    trainer = make(tmp_path, Tiny())
    trainer.resume()
    assert fit(trainer).progress.finished
    assert_same(state(tmp_path), before)
    assert lines(tmp_path) == metrics


def test_the_loss_falls(tmp_path: Path) -> None:
    fit(make(tmp_path, Tiny(epochs=10, base_lr=4.0)))
    values = [loss for _, _, loss in losses(tmp_path)]
    assert sum(values[-4:]) < 0.5 * sum(values[:4])


def test_training_time_adds_up(tmp_path: Path) -> None:
    first = fit(make(tmp_path, Tiny()), time_limit=0)
    second = make(tmp_path, Tiny())
    second.resume()
    assert second.progress.seconds == first.progress.seconds > 0
    assert fit(second).progress.seconds > first.progress.seconds


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_stops_after_the_step_and_saves(tmp_path: Path, numbers: list[signal.Signals]) -> None:
    def stop() -> None:
        for number in numbers:
            send(number)()

    trainer = fit(make(tmp_path, Tiny(on_batch=at_batch(3, stop))))
    assert (trainer.progress.step, trainer.progress.finished) == (3, False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert load_tensors(trainer.checkpoint)[1]["step"] == 3


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    trainer = make(tmp_path, Tiny(on_batch=at_batch(3, twice)))
    with pytest.raises(KeyboardInterrupt):
        fit(trainer)
    assert not trainer.checkpoint.exists()


def test_a_signal_during_the_last_save_does_not_break_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_under_fire(*args: Any, **settings: Any) -> None:
        send(signal.SIGTERM)()
        save_file(*args, **settings)

    monkeypatch.setattr(storage, "save_file", save_under_fire)
    trainer = fit(make(tmp_path, Tiny()))
    assert load_tensors(trainer.checkpoint)[1]["step"] == trainer.progress.steps


def test_outside_of_the_main_thread_there_are_no_signals_to_wait_for(tmp_path: Path) -> None:
    trainer = make(tmp_path, Tiny())
    thread = threading.Thread(target=fit, args=(trainer,))
    thread.start()
    thread.join()
    assert trainer.progress.finished


def test_the_time_limit_stops_after_a_step_and_saves(tmp_path: Path) -> None:
    trainer = fit(make(tmp_path, Tiny()), time_limit=0)
    assert trainer.progress.step == 1
    assert load_tensors(trainer.checkpoint)[1]["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    fit(make(tmp_path, Tiny()), time_limit=0)
    good = (tmp_path / "checkpoint.safetensors").read_bytes()
    model: list[nn.Module] = []

    def poison() -> None:
        with torch.no_grad():
            next(model[0].parameters()).fill_(float("nan"))

    trainer = make(tmp_path, Tiny(on_batch=at_batch(4, poison)))
    model.append(trainer.model)
    trainer.resume()
    # Of eight steps, the first is done already: the poison comes in the fifth. The rate is that of step 5 of 8.
    rate = 1.0 * 4 / 256 * schedule_factor(4, steps=8, warmup_steps=1, warmup="linear", schedule="cosine")
    with pytest.raises(TrainingError, match=rf"^the loss is nan at step 5, with learning rate {rate:.3g}: try .*$"):
        fit(trainer)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    make(tmp_path, Tiny()).resume()


@pytest.mark.parametrize("watched", [False, True])
def test_a_step_that_breaks_the_weights_is_not_saved(tmp_path: Path, watched: bool) -> None:
    def monitor(model: nn.Module) -> dict[str, float]:
        raise AssertionError("there is nothing left to measure")

    def steepen() -> None:
        with torch.no_grad():
            trainer.model.get_parameter("head.weight").mul_(1e15)  # the loss is then about 1e30: large, but finite

    recipe = Tiny(on_batch=at_batch(1, steepen), base_lr=1e12, batch_size=IMAGES, epochs=1, warmup_epochs=0)
    trainer = make(tmp_path, recipe)
    with pytest.raises(
        TrainingError, match=r"^encoder\.0\.weight is not finite at step 1, with learning rate 7.03e\+10"
    ):
        fit(trainer, monitor=monitor if watched else None)
    assert not trainer.checkpoint.exists()
    assert math.isfinite(losses(tmp_path)[0][2])


def another_model(trainer: Trainer) -> None:
    trainer.model.head = nn.Linear(4, 3)


def other_images(trainer: Trainer) -> None:
    trainer.facts = {"images": "another digest"}


def truncated(trainer: Trainer) -> None:
    trainer.checkpoint.write_bytes(trainer.checkpoint.read_bytes()[:-1])


def absent(trainer: Trainer) -> None:
    trainer.checkpoint.unlink()


def of_another_program(trainer: Trainer) -> None:
    weights = trainer.model.state_dict().items()
    save_file({f"model.{name}": tensor.contiguous() for name, tensor in weights}, trainer.checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_model, r"belongs to another model: head.bias has the shape \(2,\) in it, but expected is \(3,\)"),
        (other_images, "has another images: digest, but given is another digest"),
        (truncated, "is damaged or not a safetensors file"),
        (absent, "is not there"),
        (of_another_program, "is not a checkpoint: it lacks images, seconds, step"),
    ],
)
def test_checkpoints_that_cannot_go_on_are_refused(
    tmp_path: Path, damage: Callable[[Trainer], None], message: str
) -> None:
    fit(make(tmp_path, Tiny()), time_limit=0)
    trainer = make(tmp_path, Tiny())
    damage(trainer)
    with pytest.raises(CheckpointError, match=message) as refusal:
        trainer.resume()
    assert str(refusal.value).startswith(str(trainer.checkpoint))
    assert "\n" not in str(refusal.value)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        Path(args[1]).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = make(tmp_path, Tiny(on_batch=at_batch(3, lambda: monkeypatch.setattr(storage, "save_file", full))))
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint.safetensors: .*No space left on device"):
        fit(trainer, save_minutes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl"]
    again = make(tmp_path, Tiny())
    again.resume()
    assert again.progress.step == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full device is Linux's")
def test_a_full_disk_is_named_where_the_metrics_go() -> None:
    with pytest.raises(CheckpointError, match=r"cannot write /dev/full: .*No space left on device"):
        Metrics(Path("/dev/full")).write({"step": 1})


def test_rewinding_on_a_full_disk_keeps_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, encoding: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        metrics.rewind(0)
    assert lines(tmp_path) == [{"step": 1}]


def test_the_learning_rate_follows_batch_and_schedule(tmp_path: Path) -> None:
    trainer = fit(make(tmp_path, Tiny(epochs=3, warmup_epochs=0.5, base_lr=2.0)))
    steps = 3 * (IMAGES // 4)
    assert trainer.progress.steps == steps == 12
    peak = 2.0 * 4 / 256
    warm = [0.5 * peak, peak]
    cosine = [peak * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert [lr for _, lr, _ in losses(tmp_path)] == pytest.approx(warm + cosine)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[1]["lr"] == cosine[-1]


def gradient_of_a_step(directory: Path, recipe: MAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    model = recipe.build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    directory.mkdir()
    fit(Trainer(model, recipe, pixels, directory, device=CPU, bf16=False, seed=0, facts={}))
    after = model.named_parameters()
    return {name: (before[name] - parameter.detach()) / recipe.lr for name, parameter in after}, lines(directory)[0]


TINY_MAE = MAE(
    encoder="vit_tiny",
    image_size=16,
    patch_size=8,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
    batch_size=8,
    epochs=1,
    optimizer="sgd",
    base_lr=32.0,  # 1.0 at batch 8: a step of plain SGD is then the gradient itself
    weight_decay=0.0,
    warmup_epochs=0,
)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole, line = gradient_of_a_step(tmp_path / "whole", replace(TINY_MAE, clip_grad=1e9))
    parts, in_parts = gradient_of_a_step(tmp_path / "parts", replace(TINY_MAE, clip_grad=1e9, accumulate=4))
    assert in_parts["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert in_parts["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_gradients_are_clipped_by_their_norm(tmp_path: Path) -> None:
    free, _ = gradient_of_a_step(tmp_path / "free", TINY_MAE)
    clipped, line = gradient_of_a_step(tmp_path / "clipped", replace(TINY_MAE, clip_grad=0.01))
    norm = torch.cat([gradient.flatten() for gradient in free.values()]).norm().item()
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)  # as it was before clipping
    short = torch.cat([gradient.flatten() for gradient in clipped.values()]).norm().item()
    assert short == pytest.approx(0.01, rel=1e-2)
    assert short < norm / 10


def epochs_seen(directory: Path, seed: int) -> list[list[int]]:
    batches: list[list[int]] = []
    recipe = Tiny(on_batch=lambda images: batches.append(images[:, 0, 0, 0].tolist()))
    fit(make(directory, recipe, seed=seed))
    images = list(itertools.chain(*batches))
    return [images[: len(images) // 2], images[len(images) // 2 :]]


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    first, second = epochs_seen(tmp_path / "0", seed=0)
    assert len(first) == len(second) == 16  # what does not fill a batch is left out
    assert len(set(first)) == len(set(second)) == 16
    assert first != second
    assert epochs_seen(tmp_path / "0 again", seed=0) == [first, second]
    assert epochs_seen(tmp_path / "1", seed=1)[0] != first


def test_what_is_kept_comes_before_the_checkpoint_from_which_a_run_goes_on(tmp_path: Path) -> None:
    kept: list[tuple[int, int]] = []

    def keep(epoch: int) -> None:
        saved = load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"]
        kept.append((epoch, saved))

    trainer = make(tmp_path, Tiny())
    trainer.save()
    for _ in range(trainer.steps_per_epoch):
        fit(trainer, keep=keep, keep_epochs=1, time_limit=0)
    assert kept == [(1, trainer.steps_per_epoch - 1)]


def test_the_monitor_looks_between_epochs_and_changes_nothing(tmp_path: Path) -> None:
    looks: list[int] = []

    def monitor(model: nn.Module) -> dict[str, float]:
        looks.append(trainer.progress.step)
        model.eval()
        torch.manual_seed(5)
        return {"knn_accuracy": 12.5}

    watched, alone = tmp_path / "watched", tmp_path / "alone"
    recipe = Tiny(epochs=5)
    trainer = make(watched, recipe)
    fit(trainer, monitor=monitor, monitor_epochs=2)
    assert looks == [8, 16, 20]  # every second epoch, and the last
    fit(make(alone, recipe))
    extra = [line for line in lines(watched) if "knn_accuracy" in line]
    assert extra == [{"step": step, "epoch": step / 4, "knn_accuracy": 12.5} for step in looks]
    assert [line["loss"] for line in lines(watched) if "loss" in line] == [line["loss"] for line in lines(alone)]
    assert_same(state(watched), state(alone))


def test_a_look_does_not_compile_the_network_anew(tmp_path: Path) -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph

    def monitor(model: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            cast(nn.Module, model.eval().encoder)(torch.zeros(7, *PIXELS.shape[1:]))
        return {"knn_accuracy": 12.5}

    trainer = make(tmp_path, Tiny())
    cast(nn.Module, trainer.model.encoder).compile(backend=backend)
    fit(trainer, monitor=monitor)
    assert len(graphs) == 1


def test_metrics_of_the_model_are_logged_for_each_step(tmp_path: Path) -> None:
    fit(make(tmp_path, Tiny(epochs=6)))  # more steps than stay on the device at a time
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 25))
    for line in lines(tmp_path):
        assert set(line) == {"step", "epoch", "lr", "images_per_second", "loss", "size"}
        assert line["epoch"] == line["step"] / 4
        assert line["images_per_second"] > 0
        assert line["size"] > 0


def test_an_estimate_changes_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path / "tried", Tiny())
    seconds, memory = trainer.estimate()
    assert 0 < seconds < 60
    assert memory is None or memory > 2**20
    fit(trainer)
    fit(make(tmp_path / "not", Tiny()))
    assert losses(tmp_path / "tried") == losses(tmp_path / "not")
    assert_same(state(tmp_path / "tried"), state(tmp_path / "not"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes. Error code 12"),
    ],
)
def test_what_is_too_large_for_the_memory_is_refused(tmp_path: Path, error: RuntimeError) -> None:
    def too_large(images: Tensor) -> None:
        raise error

    trainer = make(tmp_path, Tiny(on_batch=too_large))
    with pytest.raises(RecipeError, match=r"^batch_size=4 in micro-batches of 4 does not fit into the memory of cpu"):
        trainer.estimate()


def test_other_errors_of_torch_are_its_own(tmp_path: Path) -> None:
    def broken(images: Tensor) -> None:
        raise RuntimeError("The size of tensor a (3) must match")

    with pytest.raises(RuntimeError, match=r"^The size of tensor a"):
        make(tmp_path, Tiny(on_batch=broken)).estimate()


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"batch_size=20 is larger than the data set of 18 images: .* valid is 18"):
        make(tmp_path, Tiny(batch_size=20))
    with pytest.raises(RecipeError, match=r"the nearest valid is 16$"):
        make(tmp_path, Tiny(batch_size=20, accumulate=4))
    assert make(tmp_path, Tiny(batch_size=18)).progress.steps == 2


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision_ssl.engine.world_size", lambda: 3)
    message = r"batch_size=8 is not divisible by processes \* accumulate = 6: the nearest valid is 6$"
    with pytest.raises(RecipeError, match=message):
        make(tmp_path, Tiny(batch_size=8, accumulate=2))


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "meta:x", ""):
        with pytest.raises(
            RecipeError, match=rf"^device='{name}' cannot be used here: .*; expected auto, cpu or cuda$"
        ):
            pick_device(name)
    assert not native_bf16(torch.device("mps"))


@pytest.mark.parametrize("matrix_units", [False, True])
def test_bf16_on_a_cpu_needs_matrix_units(monkeypatch: pytest.MonkeyPatch, matrix_units: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    assert native_bf16(CPU) == matrix_units


def test_a_constant_is_sent_to_its_device_once_and_takes_part_in_training() -> None:
    with torch.inference_mode():
        first = constant((0.1, 0.2), CPU)
    assert constant((0.1, 0.2), CPU) is first
    assert first.tolist() == pytest.approx([0.1, 0.2])
    weight = torch.ones(2, requires_grad=True)
    (weight * first).sum().backward()
    assert torch.equal(cast(Tensor, weight.grad), first)


@pytest.mark.parametrize("before", [False, True])
def test_convolutions_are_tuned_while_training_unless_they_must_be_deterministic(
    monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    for deterministic in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
        with fastest_convolutions():
            assert torch.backends.cudnn.benchmark is not deterministic
        assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize(
    ("compile", "device", "steps", "compiled"),
    [
        ("on", "cpu", 8, True),
        ("off", "cuda", 8000, False),
        ("auto", "cpu", 8000, False),
        ("auto", "cuda", 8, False),
        ("auto", "cuda", 8000, True),
    ],
)
def test_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile: str, device: str, steps: int, compiled: bool
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: seen.append((self, dynamic)))

    def compiled_views(*_: object) -> tuple[Tensor, ...]:
        return ()

    def compile_function(function: object, dynamic: bool) -> object:
        seen.append((function, dynamic))
        return compiled_views

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr("vision_ssl.engine.brought_near", lambda pixels, device: pixels)
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)  # there may be no GPU here
    recipe, model = Tiny(epochs=steps // 4), TinyModel(True)
    options: dict[str, Any] = {"device": torch.device(device), "bf16": False, "seed": 0, "facts": {}}
    trainer = Trainer(model, recipe, PIXELS, tmp_path, compile=compile, **options)
    assert trainer.progress.steps == steps
    both = [(model, False), (recipe.augment, False)]
    assert seen == (both[: 2 if device == "cuda" else 1] if compiled else [])
    assert (trainer._augment is compiled_views) == (compiled and device == "cuda")


def test_a_step_takes_the_views_that_were_compiled(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "bf16": False, "seed": 0, "facts": {}}
    trainer = Trainer(TinyModel(True), Tiny(), PIXELS, tmp_path, **options)
    calls: list[Tensor] = []

    def augment(images: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        calls.append(images)
        return trainer.recipe.augment(images, draws)

    trainer._augment = augment
    trainer.estimate()
    assert len(calls) == 2  # of two micro-batches
