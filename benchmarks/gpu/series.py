"""Several trainings where the minutes are few: compiled together, then trained in a row and packed.

    python -m benchmarks.gpu.series simclr_resnet18=70 mae_vit_tiny=30 --data tiny-imagenet-200 --work work --out out

The epochs are those that the minutes allow at the speeds of `README.md`; nothing stops a training before its end.
Compiling takes processors and hardly a GPU, so that all jobs do it at once, on whatever images are there already:
`--part` names a folder with some of them, and `--wait-for` a file that appears once they all are. The packed weights of
a job are in its own folder under `--out`, as soon as it is trained; `pack.py join` makes a run of them, to be measured
elsewhere. What happened when is in `progress.log` there.
"""

import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.gpu.job import TRAININGS, Measured

LOG = "progress.log"
NO_LIMIT = 1000  # minutes


@dataclass
class Arguments:
    """What to train, and where.

    Attributes:
        jobs: `NAME=EPOCHS` each.
        data: As for a job.
        work: Folder that lasts from call to call.
        out: Folder for what is to be kept.
        part: Images to compile with, by default `data`.
        wait_for: A file without which no training begins.
        measure: As for a job; probes want the GPU for themselves, and come after each training.
        init: Start from the newest weights of each name, and not at random.
        device: Where to compute.
        tiny: Rehearse.
    """

    jobs: tyro.conf.Positional[tuple[str, ...]]
    data: str
    work: Path
    out: Path
    part: str | None = None
    wait_for: Path | None = None
    measure: Measured = "nothing"
    init: bool = False
    device: str = "auto"
    tiny: bool = False


def parsed(jobs: tuple[str, ...]) -> dict[str, int]:
    """Epochs of each job.

    Raises:
        SystemExit: One of them is not `NAME=EPOCHS`.
    """
    found = {}
    for job in jobs:
        name, _, epochs = job.partition("=")
        if name not in TRAININGS or not re.fullmatch("[1-9][0-9]*", epochs):
            sys.exit(f"jobs={job!r}: expected NAME=EPOCHS, with one of {', '.join(TRAININGS)}")
        found[name] = int(epochs)
    return found


def start(arguments: Arguments, name: str, *options: object, data: str, work: Path) -> subprocess.Popen[bytes]:
    """Begin a job, whose words go to a file of its own."""
    fixed: list[object] = ["--work", work, "--out", arguments.out / name, "--device", arguments.device]
    tiny = ["--tiny"] if arguments.tiny else []
    command = [sys.executable, "-m", "benchmarks.gpu.job", name, "--data", data, *map(str, [*fixed, *options, *tiny])]
    with (arguments.out / f"{name}.log").open("ab") as log:
        log.write(f"$ {shlex.join(command[1:])}\n".encode())
        log.flush()
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def main(arguments: Arguments) -> None:
    """Compile, train, pack; a job that fails does not stop the others."""
    jobs, part = parsed(arguments.jobs), arguments.part or arguments.data
    arguments.out.mkdir(parents=True, exist_ok=True)

    def say(*words: object) -> None:
        with (arguments.out / LOG).open("a") as log:
            print(time.strftime("%H:%M:%S"), *words, file=log)

    compile = "off" if arguments.tiny else "on"
    pilots = {
        # In folders of their own: they decode the same images at the same time.
        name: start(arguments, name, "--pilot", "--compile", compile, data=part, work=arguments.work / f"pilot-{name}")
        for name in jobs
    }
    compiled = {}
    for name, process in pilots.items():
        compiled[name] = process.wait() == 0
        say("compiled" if compiled[name] else "not compiled", name)
    while arguments.wait_for is not None and not arguments.wait_for.exists():
        time.sleep(0.5)
    for name, epochs in jobs.items():
        how = ["--epochs", epochs, "--compile", compile if compiled[name] else "off"]
        how += ["--init"] if arguments.init else []
        options = (*how, "--minutes", NO_LIMIT, "--measure", arguments.measure)
        say("trained", name, start(arguments, name, *options, data=arguments.data, work=arguments.work).wait())
    say("done")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
