"""Images a second of training and of extraction, on a GPU, beside the same networks in plain PyTorch.

Run it by `python -m benchmarks.throughput --device cuda`; `--tiny` rehearses everything on a CPU in a minute. Training
is the real loop: images on the device, augmentation, forward, backward, update, metrics; SimCLR counts source images.
The peer is what one would write by hand: the same arithmetic in eager bfloat16, on batches that are already augmented.
Where lightly is installed, its own model is a peer too.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.timing import RESULTS, spread
from vision_ssl import MAE, SimCLR, extract, open_images
from vision_ssl.augment import Draws
from vision_ssl.device import fastest_convolutions, native_bf16, pick_device
from vision_ssl.encoders import resolve_encoder
from vision_ssl.features import BATCH
from vision_ssl.hub import attach
from vision_ssl.optim import build_optimizer
from vision_ssl.pretrain import commit_of_package, describe_machine
from vision_ssl.recipes import Recipe
from vision_ssl.storage import save_json

ROUNDS = 5
BATCHES = 5  # images of a training run, in steps
# Images a second that an H100's arithmetic allows in bf16, and what is asked for.
TRAINING: dict[str, tuple[Recipe, int, int]] = {
    "SimCLR ResNet-18 at 32 px": (SimCLR(image_size=32, batch_size=1024), 118_000, 30_000),
    "MAE ViT-S/8 at 64 px": (MAE(image_size=64, batch_size=2048), 226_000, 38_000),
    "SimCLR ResNet-50 at 64 px": (SimCLR(encoder="resnet50", image_size=64, batch_size=512), 12_700, 3_500),
}
FEATURES, FEATURES_ASKED = "features of ViT-S/16 at 224 px, weights in bfloat16", 25_000


@dataclass
class Arguments:
    """What to measure.

    Attributes:
        device: Where.
        tiny: Small batches and few steps: a rehearsal, whose figures mean nothing.
        steps: Steps of a training run that are timed, after as many that are not.
        only: Groups of rows whose names, such as `MAE ViT-S/8 at 64 px`, hold one of these; by default all.
        profile: Print what processor and device spend their time on in each group, and save nothing.
        out: The JSON, whose other rows stay.
    """

    device: str = "auto"
    tiny: bool = False
    steps: int = 100
    only: tuple[str, ...] = ()
    profile: bool = False
    out: Path = RESULTS / "throughput.json"


def random_pixels(count: int, size: int) -> Tensor:
    """uint8 (count, 3, size, size); the arithmetic does not depend on what is in them."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def training(recipe: Recipe, device: torch.device, steps: int, compile: str) -> list[float]:
    """Images a second of the real loop, in `ROUNDS` parts of the second half of a run."""
    pixels = random_pixels(recipe.batch_size * BATCHES, recipe.image_size)
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, epochs=2 * steps // BATCHES)
        run = recipe.train(
            pixels, out=Path(folder) / "run", device=str(device), compile=compile, look_epochs=0, save_minutes=60
        )
        seconds = [recipe.batch_size / line["images_per_second"] for line in run.metrics[-steps:]]
    part = steps // ROUNDS
    return [recipe.batch_size * part / sum(seconds[at : at + part]) for at in range(0, part * ROUNDS, part)]


def profiled(work: Callable[[], list[float]], batch: int, device: torch.device) -> str:
    """Tables of what takes the processor and the GPU longest, and the time of a batch: who waits for whom."""
    activities = {"cpu": torch.profiler.ProfilerActivity.CPU}
    if device.type == "cuda":
        activities["cuda"] = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=list(activities.values())) as profile:
        rates = work()
    means = profile.key_averages()
    longest = [means.table(sort_by=f"self_{kind}_time_total", row_limit=25) for kind in activities]
    return "\n".join([*longest, f"{1000 * batch / max(rates):.2f} ms for {batch:,} images"])


def rate(work: Callable[[], object], images: int, device: torch.device, repeats: int) -> list[float]:
    """Images a second of `work`, after a warm-up."""
    rates = []
    for turn in range(ROUNDS + 1):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn > 0:
            rates.append(images * repeats / (time.perf_counter() - began))
    return rates


def plain_step(recipe: Recipe, model: torch.nn.Module, device: torch.device, *views: Tensor) -> Callable[[], object]:
    """Forward, backward and update as one would write them by hand, with the layout and kernels that are fastest."""
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optimizer, model, lr=0.01, weight_decay=1e-4, betas=recipe.betas)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)), fastest_convolutions():
            output = model(*views)
        (output[0] if isinstance(output, tuple) else output).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peers(recipe: Recipe, device: torch.device) -> dict[str, Callable[[], object]]:
    """What others do in a step: none of them augments."""
    size, batch = recipe.image_size, recipe.batch_size
    images = [torch.randn(batch, 3, size, size, device=device) for _ in range(2)]
    views = (
        images if isinstance(recipe, SimCLR) else [images[0], torch.rand(batch, recipe_units(recipe), device=device)]
    )
    found = {"our model, eager": plain_step(recipe, recipe.build(), device, *views)}
    try:
        from benchmarks.bench_step import LightlyMAE, LightlySimCLR
    except ImportError:
        return found
    if isinstance(recipe, SimCLR):
        if recipe.encoder == "resnet18":  # the width of its head
            found["lightly"] = plain_step(recipe, LightlySimCLR(recipe), device, *images)
    elif isinstance(recipe, MAE):
        found["lightly"] = plain_step(recipe, LightlyMAE(recipe), device, images[0])
    return found


def recipe_units(recipe: Recipe) -> int:
    """Patches of a view."""
    patch_size: int = recipe.encoder_spec().args["patch_size"]
    return (recipe.image_size // patch_size) ** 2


def augmentation(recipe: Recipe, device: torch.device, repeats: int, compile: str) -> list[float]:
    """Images a second of the views alone."""
    pixels = random_pixels(recipe.batch_size, recipe.image_size).to(device)
    whole = slice(0, recipe.batch_size)
    augment = torch.compile(recipe.augment, dynamic=False) if compile == "on" else recipe.augment

    def work() -> object:
        return augment(pixels, Draws(0, rows=whole, total=recipe.batch_size, device=device))

    return rate(work, recipe.batch_size, device, repeats)


def features(device: torch.device, count: int) -> list[float]:
    """Images a second of `extract`, for ViT-S/16 at 224 px with weights in bfloat16."""
    encoder = attach(resolve_encoder("vit_small", image_size=224).build(), 224, 3, card={}).to(torch.bfloat16)
    encoder.to(device)
    images = open_images(random_pixels(count, 224), size=224)  # here, since it hashes them
    return rate(lambda: extract(encoder, images, device=device), count, device, 1)


def main(arguments: Arguments) -> None:
    """Measure, print, and write the JSON after each row, so that an interruption costs one; others stay in it."""
    if arguments.tiny and arguments.out == Arguments.out:
        raise SystemExit(f"tiny: its figures mean nothing: expected another out than {arguments.out}")
    if arguments.steps < ROUNDS:
        raise SystemExit(f"steps={arguments.steps}: expected at least {ROUNDS}, of which the spread is taken")
    device = pick_device(arguments.device)
    steps, repeats, compile = (ROUNDS, 1, "off") if arguments.tiny else (arguments.steps, 20, "on")
    facts = {
        "machine": describe_machine(device),
        "torch": torch.__version__,
        "commit": commit_of_package(),
        "tiny": arguments.tiny,
    }
    kept = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"] if arguments.out.exists() else []
    rows: dict[str, dict[str, Any]] = {row["work"]: row for row in kept}

    def add(work: str, rates: list[float], **more: Any) -> None:
        rows[work] = {"work": work, "images_per_second": spread(rates), **more, **facts}
        print(json.dumps(rows[work]), flush=True)
        save_json(arguments.out, {"rows": list(rows.values())})

    def wanted(work: str) -> bool:
        return not arguments.only or any(part in work for part in arguments.only)

    groups = [FEATURES, *TRAINING]
    if not any(map(wanted, groups)):
        raise SystemExit(f"only={arguments.only} fits no row: expected parts of {', '.join(groups)}")
    if wanted(FEATURES):
        count = 4 if arguments.tiny else 8192
        if arguments.profile:
            print(f"{FEATURES}\n{profiled(partial(features, device, count), min(BATCH, count), device)}", flush=True)
        else:
            add(FEATURES, features(device, count), asked_for=FEATURES_ASKED)
    for name, (full, ceiling, asked) in TRAINING.items():
        if not wanted(name):
            continue
        recipe = replace(full, batch_size=4) if arguments.tiny else full
        kinds = {"exact views": recipe} | (
            {"fast views": replace(recipe, fast_views=True)} if isinstance(recipe, SimCLR) else {}
        )
        if arguments.profile:
            for kind, own in kinds.items():
                run = partial(training, own, device, steps, compile)
                print(f"{name}, {kind}\n{profiled(run, own.batch_size, device)}", flush=True)
            continue
        for kind, own in kinds.items():
            rates = training(own, device, steps, compile)
            add(f"{name}, {kind}, compile {compile}", rates, ceiling=ceiling, asked_for=asked)
            add(f"{name}, {kind}, augmentation alone, compile {compile}", augmentation(own, device, repeats, compile))
        for peer, work in peers(recipe, device).items():
            add(f"{name}, without augmentation: {peer}", rate(work, recipe.batch_size, device, repeats))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
