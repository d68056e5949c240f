"""Devices: which one to use, what it can do, and what fits into its memory."""

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import RecipeError


def pick_device(name: str) -> torch.device:
    """Resolve `auto` to the first GPU (under torchrun, this process's), Apple's if there is no other, or the CPU.

    Raises:
        RecipeError: The device does not exist here.
    """
    if name == "auto":
        gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((gpu for gpu, there in gpus.items() if there), "cpu")
    if "LOCAL_RANK" in os.environ and name.startswith("cuda"):  # under torchrun, each process has its own
        if name != "cuda":
            raise RecipeError(f"device={name!r} cannot be shared by the processes of torchrun: expected auto or cuda")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"device={name!r} cannot be used here: {reason}; expected auto, cpu or cuda") from error
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, so that it is faster than float32 there.

    Of CPUs, those with matrix units (AMX) do: AVX-512 alone has bfloat16 instructions too, but a training step with
    them takes 1.3 to 1.7 times as long as in float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # There is no public name; versions and builds without this one get float32, which is right everywhere.
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(supported and supported())
    return False


def brought_near(pixels: Tensor, device: torch.device) -> Tensor:
    """The images on the GPU, if they take at most a quarter of its free memory; otherwise where they are."""
    if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
        return pixels.to(device)
    return pixels


def brought_ahead(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Each batch on the device; a GPU receives the next one while it works on this one."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    transfers = torch.cuda.Stream(device)

    def bring(batch: Tensor) -> Tensor:
        with torch.cuda.stream(transfers):
            return batch.pin_memory().to(device, non_blocking=True)  # from other memory, it would wait for the device

    with ThreadPoolExecutor(1) as worker:
        transferred = (worker.submit(bring, batch) for batch in batches)
        coming = next(transferred, None)
        while coming is not None:
            batch, compute = coming.result(), torch.cuda.current_stream(device)
            compute.wait_stream(transfers)
            coming = next(transferred, None)
            batch.record_stream(compute)  # its memory is not given away before the work on it ends
            yield batch


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Let cuDNN try its kernels once for each size of convolution, unless determinism was asked for."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, not cudnn.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before


def peak_memory(device: torch.device) -> int | None:
    """Most memory in use so far, bytes: the GPU's on CUDA, otherwise the process's where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the system, had no room: torch has a name for the first alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 vector on the device, sent there once: each transfer from the host would wait for the device."""
    if torch.compiler.is_compiling():  # it becomes part of what is compiled
        return torch.tensor(values, dtype=torch.float32, device=device)
    return _kept(values, device)


@functools.cache
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # what is made under it could not take part in training
        return torch.tensor(values, dtype=torch.float32, device=device)
