"""The training loop: precision, processes, checkpoints, stopping and going on. It knows no method."""

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .augment import Draws
from .checkpoint import load_checkpoint, save_checkpoint
from .cpu import use_fast_kernels
from .device import brought_near, fastest_convolutions, is_out_of_memory, peak_memory
from .distributed import any_rank, gather, rank, world_size
from .errors import CheckpointError, RecipeError, TrainingError
from .optim import build_optimizer, schedule_factor
from .signals import stop_signals
from .storage import save_text

if TYPE_CHECKING:
    from .recipes import Recipe

FLUSH_STEPS = 20  # reading a loss waits for the device: metrics stay there for this many steps
COMPILE_STEPS = 2000  # of a run that is worth the minute


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        seconds: Training time, over all continuations.
    """

    step: int
    steps: int
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.step >= self.steps


@dataclass
class Metrics:
    """The file `metrics.jsonl`: one line a step, and one for each look at the encoder."""

    path: Path
    pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=list)

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, which will be written again, and a last one that was cut off.

        Raises:
            CheckpointError: The disk refuses.
        """
        if rank() or not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        save_text(self.path, "".join(line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= step))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, from the first process.

        Raises:
            CheckpointError: The disk refuses.
        """
        if rank() > 0:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error}; the last checkpoint is untouched") from error

    def flush(self) -> None:
        """Write what is pending, as means over all processes, which must come here together.

        Raises:
            TrainingError: A loss is not finite.
            CheckpointError: The disk refuses.
        """
        if not self.pending:
            return
        # One transfer from the device for all lines.
        values = torch.stack([torch.stack(list(tensors.values())).float() for _, tensors in self.pending])
        rows = gather(values[None]).mean(dim=0).tolist()
        for (facts, tensors), row in zip(self.pending, rows, strict=True):
            line = facts | dict(zip(tensors, row, strict=True))
            if not math.isfinite(line["loss"]):
                raise _not_finite(f"the loss is {line['loss']}", line["step"], line["lr"])
            self.write(line)
        self.pending.clear()


def _not_finite(what: str, step: int, lr: float) -> TrainingError:
    return TrainingError(
        f"{what} at step {step:,}, with learning rate {lr:.3g}: try a lower base_lr, a longer warm-up or "
        "clip_grad=1.0; the last checkpoint is untouched"
    )


class Trainer:
    """One run of one model on one set of images.

    Args:
        model: Called with the views, returns the loss and further metrics.
        recipe: Hyper-parameters and augmentation.
        pixels: uint8 (N, C, H, W) images.
        directory: Where `checkpoint.safetensors` and `metrics.jsonl` are kept.
        device: Where to train.
        bf16: Compute in bfloat16 where autocast thinks it safe.
        seed: Seed of the order of the images and of the views.
        compile: `on`, `off`, or `auto`; see `RunOptions`.
        facts: Plain data that goes into every checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: "Recipe",
        pixels: Tensor,
        directory: Path,
        *,
        device: torch.device,
        bf16: bool,
        seed: int,
        facts: dict[str, Any],
        compile: str = "off",
    ) -> None:
        pieces = world_size() * recipe.accumulate
        self.micro_size, rest = divmod(recipe.batch_size, pieces)
        if rest:
            raise RecipeError(
                f"batch_size={recipe.batch_size} is not divisible by processes * accumulate = {pieces}: "
                f"the nearest valid is {max(1, round(recipe.batch_size / pieces)) * pieces}"
            )
        if len(pixels) < recipe.batch_size:
            raise RecipeError(
                f"batch_size={recipe.batch_size} is larger than the data set of {len(pixels)} images: "
                f"the nearest valid is {len(pixels) // pieces * pieces}"
            )
        if device.type == "cpu":
            use_fast_kernels(model, bf16=bf16)
        # Convolutions are fastest when channels come last in memory; other layers do not mind.
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.pixels = brought_near(pixels, device)
        self.checkpoint = directory / "checkpoint.safetensors"
        self.device = device
        self.bf16 = bf16
        self.seed = seed
        self.facts = facts
        self.metrics = Metrics(directory / "metrics.jsonl")
        self.steps_per_epoch = len(pixels) // recipe.batch_size
        self.progress = Progress(0, recipe.epochs * self.steps_per_epoch)
        self.optimizer = build_optimizer(
            recipe.optimizer, model, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=recipe.betas
        )
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._parallel = self.model
        if world_size() > 1:
            if device.type == "cuda":
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self._parallel = DistributedDataParallel(self.model)
        worth_it = device.type == "cuda" and self.progress.steps >= COMPILE_STEPS
        self.compiled = compile == "on" or (compile == "auto" and worth_it)
        self._augment = recipe.augment
        if self.compiled:
            self.model.compile(dynamic=False)  # a step has always the same shapes: kernels for any are slower
            if device.type != "cpu":  # which chooses rows to work on: each choice would end a graph
                self._augment = torch.compile(recipe.augment, dynamic=False)

    def resume(self) -> None:
        """Go on from the last checkpoint.

        Raises:
            CheckpointError: It is missing or damaged, or belongs to another model or other images.
        """
        facts = load_checkpoint(self.checkpoint, self.model, self.optimizer)
        if missing := {"step", "seconds", *self.facts} - facts.keys():
            raise CheckpointError(f"{self.checkpoint} is not a checkpoint: it lacks {', '.join(sorted(missing))}")
        for name, value in self.facts.items():
            if facts[name] != value:
                raise CheckpointError(f"{self.checkpoint} has another {name}: {facts[name]}, but given is {value}")
        self.progress.step, self.progress.seconds = facts["step"], facts["seconds"]
        self.metrics.rewind(self.progress.step)

    def estimate(self) -> tuple[float, int | None]:
        """Try two micro-batches on a copy of the model, not compiled, so that nothing of the run changes.

        Returns:
            Seconds a step, and the peak of memory in bytes: the GPU's on CUDA, otherwise the process's where the
            system tells.

        Raises:
            RecipeError: The device has too little memory.
        """
        trial = copy.deepcopy(self.model)
        try:
            for _ in range(2):  # the first one pays for kernels and memory
                began = time.perf_counter()
                self._loss(trial, step=0, micro=0)[0].backward()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - began
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RecipeError(
                f"batch_size={self.recipe.batch_size} in micro-batches of {self.micro_size} does not fit into the "
                f"memory of {self.device}: expected a smaller batch_size, smaller views, or a larger accumulate"
            ) from error
        return seconds * self.recipe.accumulate, peak_memory(self.device)

    def _rows(self, step: int, micro: int) -> tuple[Tensor, slice]:
        """Which images this process takes in a micro-batch, and where they stand in the global batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed(_mix(self.seed, epoch, 1))
            order = torch.randperm(len(self.pixels), generator=shuffle)
            self._order = epoch, order.to(self.pixels.device)  # once an epoch: the transfer waits for the device
        size = self.recipe.batch_size
        start = (rank() * self.recipe.accumulate + micro) * self.micro_size
        mine = slice(start, start + self.micro_size)
        return self._order[1][position * size : (position + 1) * size][mine], mine

    def _loss(self, model: nn.Module, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices, rows = self._rows(step, micro)
        images = self.pixels.index_select(0, indices).to(self.device)
        draws = Draws(_mix(self.seed, step, 2), rows=rows, total=self.recipe.batch_size, device=self.device)
        views = self._augment(images, draws)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return cast(tuple[Tensor, dict[str, Tensor]], model(*views))

    def _step(self) -> tuple[float, dict[str, Tensor]]:
        """One update: the learning rate, and the metrics still on the device."""
        recipe, step = self.recipe, self.progress.step
        lr = recipe.lr * schedule_factor(
            step,
            steps=self.progress.steps,
            warmup_steps=round(recipe.warmup_length * self.steps_per_epoch),
            warmup=recipe.warmup,
            schedule=recipe.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics: dict[str, Tensor] = {}
        for micro in range(recipe.accumulate):
            with self._gathering_gradients(last=micro == recipe.accumulate - 1):
                loss, extra = self._loss(self._parallel, step, micro)
                (loss / recipe.accumulate).backward()
            for name, value in {"loss": loss.detach(), **extra}.items():
                metrics[name] = metrics.get(name, 0) + value / recipe.accumulate
        if recipe.clip_grad is not None:
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return lr, metrics

    def _gathering_gradients(self, *, last: bool) -> AbstractContextManager[None]:
        """Processes exchange their gradients once a step, after the last micro-batch."""
        if isinstance(self._parallel, DistributedDataParallel) and not last:
            return cast(AbstractContextManager[None], self._parallel.no_sync())
        return nullcontext()

    def save(self) -> None:
        """Write the checkpoint, from the first process; all of them must come here together.

        Raises:
            TrainingError: A loss since the last one, or a weight, is not finite: the last one stays.
            CheckpointError: The disk refuses: the last one stays.
        """
        self._verify()
        if rank() == 0:
            facts = self.facts | {"step": self.progress.step, "seconds": self.progress.seconds}
            save_checkpoint(self.checkpoint, self.model, self.optimizer, facts)

    def _verify(self) -> None:
        """Write the metrics, and see that the step after a finite loss did not break the weights."""
        self.metrics.flush()
        broken = [name for name, tensor in self.model.state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise _not_finite(f"{broken[0]} is not finite", self.progress.step, self.optimizer.param_groups[0]["lr"])

    def fit(
        self,
        *,
        monitor: Callable[[nn.Module], dict[str, float]] | None,
        monitor_epochs: int,
        keep: Callable[[int], None],
        keep_epochs: int,
        time_limit: float | None,
        save_minutes: float,
    ) -> None:
        """Train until the last step, the time limit, Ctrl-C or SIGTERM; the checkpoint is saved in any case.

        Args:
            monitor: Looks at the model between epochs, in the first process, and returns metrics.
            monitor_epochs: Epochs between two looks.
            keep: Keeps what it likes of the model as it is after this epoch, in the first process. It comes before the
                checkpoint from which a resumed run goes on, which therefore misses none.
            keep_epochs: Epochs between two of these; 0 for none.
            time_limit: Minutes.
            save_minutes: Minutes between checkpoints.

        Raises:
            TrainingError: The loss or a weight is not finite.
            CheckpointError: The disk refuses.
        """
        progress, seconds_before = self.progress, self.progress.seconds
        began = last_save = last_step = time.perf_counter()
        self.model.train()
        bar = tqdm(total=progress.steps, initial=progress.step, unit="step", disable=rank() > 0 or None)
        with stop_signals() as stop, fastest_convolutions(), bar:
            while not progress.finished:
                lr, tensors = self._step()
                progress.step += 1
                now = time.perf_counter()
                progress.seconds = seconds_before + now - began
                facts = {
                    "step": progress.step,
                    "epoch": round(progress.step / self.steps_per_epoch, 4),
                    "lr": lr,
                    "images_per_second": round(self.recipe.batch_size / (now - last_step), 1),
                }
                last_step = now
                self.metrics.pending.append((facts, tensors))
                bar.update()
                if len(self.metrics.pending) >= FLUSH_STEPS:
                    bar.set_postfix(loss=f"{tensors['loss'].item():.3f}", images_per_second=facts["images_per_second"])
                    self.metrics.flush()
                epoch = progress.step // self.steps_per_epoch
                if monitor and self._due(monitor_epochs):
                    self._verify()
                    if rank() == 0:
                        with torch.compiler.set_stance("force_eager"):  # too short to be worth compiling anew
                            seen = monitor(self.model)
                        self.metrics.write({"step": progress.step, "epoch": epoch, **seen})
                        self.model.train()
                    last_step = time.perf_counter()
                if self._due(keep_epochs):
                    self._verify()
                    if rank() == 0:
                        keep(epoch)
                    last_step = time.perf_counter()
                late = time_limit is not None and now - began > 60 * time_limit
                if any_rank(stop.is_set() or late, self.device):
                    break
                if any_rank(now - last_save > 60 * save_minutes, self.device):
                    self.save()
                    last_save = last_step = time.perf_counter()
            self.save()  # a first signal while this is written does not end it

    def _due(self, epochs: int) -> bool:
        """Whether what happens every so many epochs, and after the last, happens after this step; never for 0."""
        epoch, position = divmod(self.progress.step, self.steps_per_epoch)
        return epochs > 0 and position == 0 and (epoch % epochs == 0 or self.progress.finished)


def _mix(*numbers: int) -> int:
    """One seed from several numbers, the same in every process and version."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
