"""Several processes that train one model: start-up, and a gather that keeps the gradient."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def rank() -> int:
    """This process's number, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started, and leave at the end; without it, do nothing."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # While the first process decodes a large source, the others wait longer than the usual ten minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield
    finally:
        dist.destroy_process_group()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process; all of them get the same answer."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return bool(votes.item())


class _Gather(Function):
    """All-gather along dim 0. Backward sums the gradient over the ranks, each of which used every row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # A copy: autograd may give the same tensor to another node, and the sum is made in place.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Concatenate the (n, ...) tensors of all ranks into (world_size * n, ...), with gradient to every rank.

    If each rank's loss is the mean over its own rows, then DDP's averaging of parameter gradients gives
    exactly the gradient of the loss over the global batch: the gradient is neither dropped nor scaled by the
    world size.
    """
    return x if world_size() == 1 else cast(Tensor, _Gather.apply(x))


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let the first process go ahead, so that the others find its work done."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()
