"""The jobs of `README.md` beside this file: each is one command that needs nobody, and goes on where it was stopped.

    python -m benchmarks.gpu.job simclr_resnet18 --data tiny-imagenet-200 --work work --out out --minutes 9

What has to outlive a call lies in `--work`: decoded images and runs. Repeat the command until it says that the job is
done; what is to be kept is then in `--out`, in parts that `pack.py` joins. `--tiny` rehearses a job on a CPU, and
`--pilot` tries and compiles a job's settings on few images, while the others are still on their way.
"""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.gpu.pack import INDEX, split
from vision_ssl.config import CONFIG_FILE
from vision_ssl.device import pick_device
from vision_ssl.engine import FLUSH_STEPS
from vision_ssl.errors import VisionSSLError
from vision_ssl.hub import read_card
from vision_ssl.pretrain import Run

UNFINISHED = 3  # exit status of a call after which another one is needed
SAVING = 0.5  # minutes that a training call keeps for its end
BATCH = 4  # parts that leave with a call
KEPT = 6  # encoders of a training, for the probe curve
TINY_DATA = "fashion-mnist-mini"


@dataclass(frozen=True)
class Training:
    """A model to train, and what is measured of it.

    Attributes:
        method: `simclr` or `mae`.
        settings: Options of `vision-ssl train`.
        epochs: Of the training.
        tiny: Options of a rehearsal.
        finetune: Epochs of fine-tuning; 0 for none.
    """

    method: str
    settings: str
    epochs: int
    tiny: str
    finetune: int = 0


# A learning rate near that of square-root scaling, which is best for short runs (Chen et al. 2020, table B.1).
SIMCLR = "--batch-size 512 --base-lr 0.9 --fast-views"
MAE = "--batch-size 1024 --base-lr 4e-4"
TINY = "--batch-size 500 --image-size 16"
TINY_VIEWS = f"{TINY} --view-size 12"
TINY_VIT = f"{TINY} --patch-size 8 --decoder-depth 1 --decoder-dim 32"
TRAININGS = {
    "simclr_resnet18": Training("simclr", f"--encoder resnet18 --view-size 48 {SIMCLR}", 200, TINY_VIEWS),
    "mae_vit_small": Training("mae", f"--encoder vit_small {MAE}", 400, TINY_VIT, finetune=30),
    "simclr_resnet50": Training("simclr", f"--encoder resnet50 --view-size 48 {SIMCLR}", 40, TINY_VIEWS),
    "mae_vit_base": Training("mae", f"--encoder vit_base {MAE}", 100, TINY_VIT, finetune=15),
    "mae_resnet18": Training("mae", f"--encoder resnet18 {MAE}", 200, TINY),
    "mae_vit_tiny": Training("mae", f"--encoder vit_tiny {MAE}", 400, TINY_VIT, finetune=30),
    "cifar10_speed": Training("simclr", f"--preset small-32 --encoder resnet18 {SIMCLR}", 300, TINY),
}
Measured = Literal["all", "curve", "nothing"]
CURVE = "probe_curve.*"
JOBS = ("smoke", "throughput", *TRAININGS)


@dataclass
class Arguments:
    """What to do, and where.

    Attributes:
        job: One of `JOBS`.
        work: Folder that lasts from call to call.
        out: Folder for what is to be kept.
        data: A labelled source with a training and a validation split.
        minutes: Of this call.
        epochs: Of the training, if not the job's own.
        init: Start from the newest weights of the job's name, with which an earlier training ended, and not at random.
        pilot: Train for four epochs, to see whether it compiles and how fast it is.
        compile: As for `vision-ssl train`.
        measure: Of what was trained: `all` of the table, the probe `curve` alone, or `nothing`, where it is to be
            measured elsewhere.
        device: Where to compute.
        tiny: Rehearse: few images, small batches, one epoch.
        seed: Of the training.
        batch: Which of the parts leave with this call, where they are too many for one: 0, then 1, ...
    """

    job: tyro.conf.Positional[str]
    work: Path
    out: Path
    data: str = TINY_DATA
    minutes: float = 9.0
    epochs: int | None = None
    init: bool = False
    pilot: bool = False
    compile: str = "auto"
    measure: Measured = "all"
    device: str = "auto"
    tiny: bool = False
    seed: int = 0
    batch: int = 0
    began: tyro.conf.Suppress[float] = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Minutes of this call that are left."""
        return self.minutes - (time.monotonic() - self.began) / 60


def run(*words: object) -> None:
    """Run a Python module or script of this repository, and stop with it if it fails."""
    command = [sys.executable, *map(str, words)]
    print("$", shlex.join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def smoke(arguments: Arguments) -> None:
    """Everything once on this device, in little: so that no later job fails on a trifle."""
    if not arguments.tiny:
        os.environ["VISION_SSL_TEST_DEVICE"] = str(pick_device(arguments.device))
        run("-m", "pytest", "-q", "tests/test_cuda.py")
    for method, options in (("simclr", TINY), ("mae", TINY_VIT)):
        out = arguments.work / f"smoke-{method}"
        if (out / "results").exists():
            continue
        where = ["--out", out, "--device", arguments.device]
        train = ["-m", "vision_ssl", "train", method, TINY_DATA, *where, *looks(10, keep=5)]
        shutil.rmtree(out, ignore_errors=True)
        compile = "off" if arguments.tiny else "on"
        run(*train, *options.split(), "--epochs", 10, "--compile", compile, "--time-limit", 0)
        run(*train, "--resume")
        curve(out, TINY_DATA, arguments)
        table(out, TINY_DATA, arguments, finetune=1)


def throughput(arguments: Arguments) -> None:
    """Images a second, beside peers."""
    tiny = ["--tiny"] if arguments.tiny else []
    result = arguments.out / "throughput.json"
    run("-m", "benchmarks.throughput", "--device", arguments.device, *tiny, "--out", result)


def pilot(arguments: Arguments, job: Training) -> None:
    """Train for four epochs, and say how fast the last two were; what is compiled stays."""
    out = arguments.work / f"pilot-{arguments.job}"
    shutil.rmtree(out, ignore_errors=True)
    how = [*settings(arguments, job), "--compile", arguments.compile]
    run(*training(arguments, job, out), *how, "--epochs", 4, "--look-epochs", 0)
    lines = Run(out).metrics
    block = min(FLUSH_STEPS, len(lines) // 2)  # steps between two at which the loop waits for the device
    steady = lines[len(lines) // 2 // block * block : len(lines) // block * block]
    speed = statistics.harmonic_mean(line["images_per_second"] for line in steady)
    print(f"{arguments.job}, compile {arguments.compile}: {speed:,.0f} images/s", flush=True)


def train(arguments: Arguments, job: Training) -> None:
    """Train within the time of this call, measure, and pack what is to be kept."""
    out = arguments.work / f"{arguments.job}-{arguments.seed}"
    if not finished(out):
        how: list[object] = ["--resume"]
        if (out / "run.json").exists():
            epochs = Run(out).settings["recipe"]["epochs"]
        else:
            epochs = 1 if arguments.tiny else arguments.epochs or job.epochs
            how = [*settings(arguments, job), "--epochs", epochs, "--compile", arguments.compile]
        when = [*looks(epochs, keep=max(1, epochs // KEPT)), "--time-limit", max(0.1, arguments.left - SAVING)]
        run(*training(arguments, job, out), *when, *how)
    if not finished(out):
        unfinished("training")
    if arguments.measure == "all" and not (out / "results").exists():
        if arguments.left < arguments.minutes / 2 and not arguments.tiny:
            unfinished("measuring")
        curve(out, arguments.data, arguments)
        table(out, arguments.data, arguments, finetune=1 if arguments.tiny and job.finetune else job.finetune)
    pack(out)
    left = hand_over(out, arguments.out, arguments.batch)
    if arguments.measure == "curve":  # once the weights are safe
        if not any(out.glob(CURVE)):
            curve(out, arguments.data, arguments)
        for path in out.glob(CURVE):
            shutil.copy(path, arguments.out)
    if left:
        unfinished(f"the transfer of {left} more parts (--batch {arguments.batch + 1})")
    print("the job is done")


def training(arguments: Arguments, job: Training, out: Path) -> list[object]:
    """The command that trains, without what a resumed run remembers."""
    where = ["--out", out, "--cache-dir", arguments.work / "cache", "--device", arguments.device]
    return ["-m", "vision_ssl", "train", job.method, arguments.data, *where]


def settings(arguments: Arguments, job: Training) -> list[object]:
    """The recipe of a job, in little if it is rehearsed."""
    init = ["--init", arguments.job] if arguments.init else []
    return [*job.settings.split(), *(job.tiny.split() if arguments.tiny else []), "--seed", arguments.seed, *init]


def looks(epochs: int, *, keep: int) -> list[object]:
    """What a resumed run has to be told again: how often the device waits for a look at the encoder, or to keep it."""
    return ["--look-epochs", epochs, "--keep-epochs", keep]


def finished(out: Path) -> bool:
    """Whether a run has had all its steps."""
    return (out / "weights" / CONFIG_FILE).exists() and bool(read_card(out)["training"]["finished"])


def unfinished(what: str) -> None:
    """Leave, and say that another call is needed."""
    print(f"{what} is not done: repeat the command")
    sys.exit(UNFINISHED)


def curve(out: Path, data: str, arguments: Arguments) -> None:
    """The curve over the kept encoders."""
    how = ["--every-checkpoint", "--protocol", "linear-sgd-study-b", "--device", arguments.device]
    run("-m", "vision_ssl", "probe", out, "--train", data, "--val", data, *how)


def table(out: Path, data: str, arguments: Arguments, *, finetune: int) -> None:
    """The figures of the README's tables."""
    device = ["--device", arguments.device]
    tuning = ["--finetune", finetune] if finetune else []
    results = out / "results.part"
    run("benchmarks/reproduce.py", "--data", data, "--models", out, *tuning, *device, "--out", results)
    results.rename(out / "results")  # whole, or not there


def pack(out: Path) -> None:
    """Everything of a run that is to be kept, in parts."""
    if (out / "parts" / INDEX).exists():
        return
    kept = out / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    for folder in (out / "weights", out / "results"):
        if folder.exists():
            shutil.copytree(folder, kept / folder.name)
    for path in [*out.glob(CURVE), out / "run.json", out / "metrics.jsonl"]:
        shutil.copy(path, kept)
    split(kept, out / "parts")


def hand_over(out: Path, target: Path, batch: int) -> int:
    """Copy the parts of a run that leave with this call: as many as fit; return how many are left for others."""
    parts = out / "parts"
    every = sorted(parts.glob("*.part"))
    for path in [parts / INDEX, *every[batch * BATCH : (batch + 1) * BATCH]]:
        shutil.copy(path, target)
    return max(0, len(every) - (batch + 1) * BATCH)


def main(arguments: Arguments) -> None:
    """Do one job, or as much of it as the time allows."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.job == "smoke":
        smoke(arguments)
    elif arguments.job == "throughput":
        throughput(arguments)
    elif arguments.job in TRAININGS:
        (pilot if arguments.pilot else train)(arguments, TRAININGS[arguments.job])
    else:
        sys.exit(f"job={arguments.job!r} is unknown: expected one of {', '.join(JOBS)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (subprocess.CalledProcessError, VisionSSLError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
