"""NT-Xent forward and backward against lightly's, and the memory that one call adds at its peak.

Run it by `python -m benchmarks.bench_loss`.
"""

import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from lightly.loss.ntx_ent_loss import NTXentLoss
from torch import Tensor

from benchmarks.timing import Comparison, record
from vision_ssl.simclr import nt_xent

DIM, TEMPERATURE = 128, 0.2


def contenders(batch: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of each loss on the same projections; they return the gradients."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(batch, DIM, generator=generator).requires_grad_() for _ in range(2))
    lightly = NTXentLoss(temperature=TEMPERATURE)
    return {
        "vision_ssl": lambda: torch.autograd.grad(nt_xent(first, second, TEMPERATURE), (first, second)),
        "lightly": lambda: torch.autograd.grad(lightly(first, second), (first, second)),
    }


def comparison(batch: int, least: float) -> Comparison:
    """A row for one batch size."""
    works = contenders(batch)
    for own, their in zip(works["vision_ssl"](), works["lightly"](), strict=True):
        torch.testing.assert_close(own, their, rtol=1e-3, atol=1e-6)
    work = f"NT-Xent forward and backward, batch {batch}, fp32, {torch.get_num_threads()} threads"
    return Comparison(work, works["vision_ssl"], {"lightly": works["lightly"]}, {"lightly": least})


def added_memory(name: str, batch: int) -> int:
    """Bytes that one call adds to the peak of a process of its own."""
    words = [sys.executable, "-m", "benchmarks.bench_loss", name, str(batch)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def print_added_memory(name: str, batch: int) -> None:
    """What `added_memory` starts; a call of batch 2 loads what any batch needs."""
    contenders(2)[name]()
    work = contenders(batch)[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def memory(batch: int) -> dict[str, int]:
    """The added bytes of each."""
    return {name: added_memory(name, batch) for name in ("vision_ssl", "lightly")}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print_added_memory(sys.argv[1], int(sys.argv[2]))
    else:
        bytes_at_4096 = memory(4096)
        print({name: f"{count / 2**20:.0f} MiB" for name, count in bytes_at_4096.items()})
        record("loss", [comparison(256, 2.5), comparison(4096, 4.0)], facts={"added_bytes_at_4096": bytes_at_4096})
