"""Time until a fresh process has imported the package, listed the models, or loaded one, against `import torch`.

Every command is a process of its own, from its start to its end, with the files in the page cache.

    python -m benchmarks.bench_startup
"""

import subprocess
import sys
from functools import partial
from typing import Any

from benchmarks.timing import spread, timed, write

ROUNDS = 7
BASE = "import torch"
COMMANDS = {
    BASE: ["-c", "import torch"],
    "import timm": ["-c", "import timm"],
    "import vision_ssl": ["-c", "import vision_ssl"],
    "vision-ssl list": ["-m", "vision_ssl", "list"],
    'vision_ssl.load("simclr_resnet18")': ["-c", "import vision_ssl; vision_ssl.load('simclr_resnet18')"],
}
AT_MOST_RATIO = {"import vision_ssl": 0.1, "vision-ssl list": 0.3}
AT_MOST_MORE = {'vision_ssl.load("simclr_resnet18")': 2.5}


def run(command: str) -> None:
    """Run it, and drop what it prints."""
    subprocess.run([sys.executable, *COMMANDS[command]], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Every round runs each command once, from another one on each time."""
    names = list(COMMANDS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        run(name)  # reads the files into the page cache
    for turn in range(ROUNDS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(partial(run, name), 1))
    rows: list[dict[str, Any]] = []
    for name, values in seconds.items():
        pairs = list(zip(values, seconds[BASE], strict=True))
        row: dict[str, Any] = {
            "work": name,
            "seconds": spread(values),
            "ratio": spread([ours / torch for ours, torch in pairs]),
            "seconds_more": spread([ours - torch for ours, torch in pairs]),
            "ratio_at_most": AT_MOST_RATIO.get(name),
            "seconds_more_at_most": AT_MOST_MORE.get(name),
        }
        rows.append(row)
        print(
            f"{name}: {row['seconds']['median']:.3g} s, {row['ratio']['median']:.3g} of {BASE}, "
            f"{row['seconds_more']['median']:+.3g} s",
            flush=True,
        )
    write("startup", rows, rounds=ROUNDS)


if __name__ == "__main__":
    main()
