"""A run: from a source and a recipe to trained weights in a directory."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from . import __version__, hub
from .card import origin_of
from .config import CONFIG_FILE
from .data import ImageSet, open_images
from .device import native_bf16, pick_device
from .diagnosis import diagnose, expected_loss
from .distributed import process_group, rank, rank_zero_first, wait_for_all, world_size
from .engine import Trainer
from .errors import CheckpointError, RecipeError
from .monitor import build_monitor
from .options import LASTING, changed_fields
from .plots import read_metrics
from .storage import save_json

if TYPE_CHECKING:
    from .data import Source
    from .options import RunOptions
    from .recipes import Recipe

RUN_FILE, WEIGHTS_FOLDER, EPOCHS_FOLDER = "run.json", "weights", "epochs"


@dataclass(frozen=True)
class Run:
    """A directory with a recipe, metrics, a checkpoint, and weights.

    Attributes:
        directory: Where it is.
    """

    directory: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was started with: `recipe`, `source`, and the lasting `options`, as plain data.

        Raises:
            CheckpointError: There is no run.
        """
        path = self.directory / RUN_FILE
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings["recipe"]
        except FileNotFoundError:
            raise CheckpointError(f"{self.directory} is not a run: expected {RUN_FILE} in it") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        return cast(dict[str, Any], settings)

    @cached_property
    def encoder(self) -> hub.Encoder:
        """The encoder as it was last exported, in eval mode."""
        return hub.load(self.directory / WEIGHTS_FOLDER)

    @property
    def kept(self) -> dict[int, Path]:
        """Folders of the encoders that were kept, as `load` takes them, by epoch."""
        configs = sorted(self.directory.glob(f"{EPOCHS_FOLDER}/[0-9]*/{CONFIG_FILE}"))
        return {int(config.parent.name): config.parent for config in configs}

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of `metrics.jsonl`: one a step, and one for each look at the encoder."""
        return [dict(line) for line in read_metrics(self.directory)]

    def push(self, repo: str, *, private: bool = False, tag: str | None = None) -> str:
        """Publish the weights and a model card on the Hugging Face Hub; return the address of the commit.

        What is there already is not sent again. `vision_ssl.load("hf:owner/name")` loads it, and timm's
        `create_model("hf-hub:owner/name", pretrained=True)`.

        Args:
            repo: `owner/name`; made if it is not there.
            private: Make it private.
            tag: A name for this commit, which never changes its meaning.

        Raises:
            WeightsError: There are no weights yet, or the Hub refuses or cannot be reached.
        """
        from .extra.push import push

        return cast(str, push(self.directory, repo, private=private, tag=tag).url)


def pretrain(recipe: "Recipe", source: "Source", options: "RunOptions") -> Run:
    """Train `recipe` on the images of `source`; see `RunOptions` for the rest.

    Raises:
        RecipeError: The recipe cannot work with these images on this device.
        CheckpointError: `out` holds another run, or one that cannot go on.
        TrainingError: The loss is not finite.
    """
    run = Run(options.directory(recipe))
    device = pick_device(options.device)
    spec = recipe.encoder_spec()
    if not options.resume and (run.directory / RUN_FILE).exists():
        raise CheckpointError(
            f"out={str(run.directory)!r} holds a run already: expected a new directory, or resume=True to go on"
        )
    # Before the images, whose decoding may take long: what cannot be built is refused at once.
    torch.manual_seed(options.seed)
    model = recipe.build()
    origin = run.settings.get("origin") if options.resume else None
    if options.init is not None and not options.resume:
        hub.load_into(model, options.init)
        origin = origin_of(hub.read_card(options.init), str(options.init))
    with process_group(device):
        with rank_zero_first():
            images = open_images(
                source,
                size=options.cache_size or recipe.image_size,
                parts=options.parts,
                cache_dir=options.cache_dir,
            )
        if images.pixels.shape[1] != recipe.channels:
            raise RecipeError(
                f"channels={recipe.channels} does not fit: the images have {images.pixels.shape[1]} channels"
            )
        encoder = cast(nn.Module, model.encoder)
        hub.attach(encoder, spec.image_size, spec.channels, card={})
        trainer = Trainer(
            model,
            recipe,
            images.pixels,
            run.directory,
            device=device,
            bf16=native_bf16(device) if options.precision == "auto" else options.precision == "bf16",
            seed=options.seed,
            compile=options.compile,
            facts={"images": images.digest},
        )
        # The commit of now: the files may change while it trains.
        card = partial(_card, recipe, images, trainer, options, origin, commit_of_package())
        if options.resume:
            trainer.resume()
        cost = trainer.estimate()  # in every process: the loss may need them all
        if rank() == 0:
            if not options.resume:
                lasting = {name: getattr(options, name) for name in LASTING}
                facts = {"recipe": recipe.to_dict(), "source": _describe(source), "options": lasting}
                facts |= {"origin": origin} if origin else {}
                save_json(run.directory / RUN_FILE, facts)
            _announce(recipe, images, trainer, run, *cost)
        if not options.resume:
            trainer.save()  # from here on the run can be resumed, whatever happens to it; and a full disk shows now

        def keep(epoch: int) -> None:
            hub.save(run.directory / EPOCHS_FOLDER / f"{epoch:04d}", encoder, spec, card=card())

        trainer.fit(
            monitor=build_monitor(images, seed=options.seed, cache_dir=options.cache_dir)
            if options.look_epochs
            else None,
            monitor_epochs=options.look_epochs,
            keep=keep,
            keep_epochs=options.keep_epochs,
            time_limit=options.time_limit,
            save_minutes=options.save_minutes,
        )
        if rank() == 0:
            hub.save(run.directory / WEIGHTS_FOLDER, encoder, spec, card=card(), head=cast(nn.Module, model.head))
            _say(f"  verdict  {diagnose(recipe, run.metrics)}")
            if not trainer.progress.finished:
                _say(f"stopped at step {trainer.progress.step:,} of {trainer.progress.steps:,}; to go on:")
                _say(f"  {_how_to_go_on(recipe, source, options, run)}")
        wait_for_all()  # so that no process returns before the weights are there
    return run


def _describe(source: "Source") -> str:
    return str(source) if isinstance(source, str | os.PathLike) else type(source).__name__


def _how_to_go_on(recipe: "Recipe", source: "Source", options: "RunOptions", run: Run) -> str:
    given = {name: getattr(options, name) for name in changed_fields(options)}
    again = given.keys() - {*LASTING, "out", "resume", "time_limit"}  # the run itself remembers what is lasting
    if not isinstance(source, str | os.PathLike):
        settings = "".join(f"{name}={given[name]!r}, " for name in sorted(again))
        return f"{type(recipe).__name__}.train(the same images, {settings}out={str(run.directory)!r}, resume=True)"
    program = ["vision-ssl"]
    if world_size() > 1:
        program = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "vision_ssl"]
    command = [*program, "train", recipe.method, str(source), "--out", str(run.directory), "--resume"]
    for name in sorted(again):
        command += [f"--{name.replace('_', '-')}", str(given[name])]
    return shlex.join(command)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _announce(
    recipe: "Recipe", images: ImageSet, trainer: Trainer, run: Run, seconds: float, memory: int | None
) -> None:
    """Print what was resolved, and what it will cost, before the first step."""
    spec, progress = recipe.encoder_spec(), trainer.progress
    sizes = [
        sum(p.numel() for p in cast(nn.Module, part).parameters()) / 1e6
        for part in (trainer.model.encoder, trainer.model.head)
    ]
    warmup = f"{recipe.warmup} for {recipe.warmup_length:g} epochs, then " if recipe.warmup_length else ""
    hours = seconds * (progress.steps - progress.step) / 3600
    left = f"{hours:.1f} hours" if hours > 2 else f"{60 * hours:.1f} minutes"
    labels = f", {len(images.classes)} classes" if images.labels is not None else ""
    lines = {
        "images": f"{images.name}: {len(images):,}{labels}, kept at {images.pixels.shape[-1]} px"
        + (f"; {len(images.skipped):,} could not be decoded" if images.skipped else ""),
        "encoder": f"{recipe.encoder}, {spec.layout}, at {recipe.image_size} px: "
        f"{sizes[0]:.1f} M parameters, and {sizes[1]:.1f} M in the head",
        "steps": f"{progress.steps:,} in {recipe.epochs:,} epochs of {trainer.steps_per_epoch:,}"
        + (f", of which {progress.step:,} are done" if progress.step else ""),
        "batch": f"{recipe.batch_size:,} images: {world_size()} process(es) x {recipe.accumulate} micro-batch(es) of "
        f"{trainer.micro_size:,}",
        "learning": f"{recipe.optimizer}, learning rate {recipe.lr:.3g} = {recipe.base_lr:.3g} x "
        f"{recipe.batch_size} / 256; {warmup}{recipe.schedule}",
        "device": f"{trainer.device}, {'bf16' if trainer.bf16 else 'fp32'}",
        "estimate": f"{left}, at {seconds:.2f} s a step{', less once it is compiled' if trainer.compiled else ''}"
        + (f"; {memory / 2**30:.1f} GiB of memory" if memory else ""),
        "out": str(run.directory),
    }
    if (losses := expected_loss(recipe)) is not None:
        lines["loss"] = f"{losses[1]:.3f} by chance, {losses[0]:.3f} at best"
    for name, value in lines.items():
        _say(f"{name:>9}  {value}")
    for note in recipe.advice():
        _say(f"  warning  {note}")


def _card(
    recipe: "Recipe",
    images: ImageSet,
    trainer: Trainer,
    options: "RunOptions",
    origin: dict[str, Any] | None,
    commit: str | None,
) -> dict[str, Any]:
    progress = trainer.progress
    return {
        "method": recipe.method,
        "recipe": recipe.to_dict(),
        "data": {"name": images.name, "images": len(images), "digest": images.digest},
        "training": {
            "epochs": progress.step / trainer.steps_per_epoch,
            "steps": progress.step,
            "finished": progress.finished,
            "minutes": round(progress.seconds / 60, 1),
            "hardware": describe_machine(trainer.device),
            "precision": "bf16" if trainer.bf16 else "fp32",
            "seed": options.seed,
            "init": options.init,
            "vision_ssl": __version__,
            "commit": commit,
            "torch": torch.__version__,
        },
        **({"origin": origin} if origin else {}),
    }


def describe_machine(device: torch.device) -> str:
    """What computes there: the GPU or processor, and how many of it."""
    if device.type == "cuda":
        return f"{world_size()} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():  # Linux, where `platform` knows the architecture alone
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} thread(s)"


def commit_of_package() -> str | None:
    """The commit of this package, when it runs from a clone; with a + if its files were changed since."""
    package = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h", "--", ".")
        changed = git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if commit and changed else commit or None
