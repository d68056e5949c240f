"""Timing of one piece of work against its peers, interleaved, and the JSON that keeps the result.

A benchmark script builds a list of `Comparison` and hands it to `record`. Every round calls each contender once, in
turn and from another one on each time, so that what the machine does meanwhile meets all of them alike; a ratio is
taken within a round. A script asserts nothing about time: it prints, and writes `results/speed/<group>.json`.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vision_ssl.pretrain import commit_of_package, describe_machine
from vision_ssl.storage import save_json

RESULTS = Path(__file__).parent / "results" / "speed"
ROUNDS = 7
LEAST_SECONDS = 0.2  # of one timing: shorter work is repeated within it

Work = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """One row: our way of doing a piece of work, and others' ways.

    Attributes:
        work: What is done, with its sizes and threads.
        ours: Does it once.
        peers: Name of each peer, to what does the same with it.
        least: Name of a peer, to the ratio of its time to ours that is asked for.
    """

    work: str
    ours: Work
    peers: Mapping[str, Work]
    least: Mapping[str, float]


def record(
    group: str, comparisons: list[Comparison], *, rounds: int = ROUNDS, facts: Mapping[str, Any] | None = None
) -> None:
    """Measure, print a line for each peer, and write the JSON of the group.

    Args:
        group: Name of the file.
        comparisons: The rows.
        rounds: Interleaved rounds, at least 5.
        facts: What else the JSON keeps.
    """
    rows: list[dict[str, Any]] = []
    for comparison in comparisons:
        rows += measure(comparison, rounds)
        for row in rows[-len(comparison.peers) :]:
            print(describe(row), flush=True)
    write(group, rows, rounds=rounds, facts=facts)


def write(group: str, rows: list[dict[str, Any]], *, rounds: int, facts: Mapping[str, Any] | None = None) -> None:
    """Write the JSON of a group: where, with what and how often was measured, and the rows."""
    save_json(
        RESULTS / f"{group}.json",
        {
            "machine": describe_machine(torch.device("cpu")),
            "torch": torch.__version__,
            "commit": commit_of_package(),
            "rounds": rounds,
            **(facts or {}),
            "rows": rows,
        },
    )


def measure(comparison: Comparison, rounds: int) -> list[dict[str, Any]]:
    """A row for each peer: median, least and largest seconds of both, and the same of their ratio."""
    contenders = {"vision_ssl": comparison.ours, **comparison.peers}
    repeats = {name: repeats_of(work) for name, work in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(contenders[name], repeats[name]))
    return [
        {
            "work": comparison.work,
            "peer": peer,
            "ours_seconds": spread(seconds["vision_ssl"]),
            "peer_seconds": spread(seconds[peer]),
            "ratio": spread([theirs / ours for theirs, ours in zip(seconds[peer], seconds["vision_ssl"], strict=True)]),
            "at_least": comparison.least.get(peer),
        }
        for peer in comparison.peers
    ]


def repeats_of(work: Work) -> int:
    """Warm up, and find how many calls fill one timing."""
    work()
    return max(1, round(LEAST_SECONDS / timed(work, 1)))


def timed(work: Work, repeats: int) -> float:
    """Seconds of one call, as the mean of `repeats`."""
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum, to four digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    ratio = row["ratio"]
    goal = f", asked for {row['at_least']:g}x" if row["at_least"] else ""
    return (
        f"{row['work']}: {1e3 * row['ours_seconds']['median']:.4g} ms, {row['peer']} "
        f"{1e3 * row['peer_seconds']['median']:.4g} ms: {ratio['median']:.2f}x "
        f"({ratio['min']:.2f} to {ratio['max']:.2f}{goal})"
    )
