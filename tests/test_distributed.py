import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from vision_ssl.distributed import any_rank, gather, process_group, rank, rank_zero_first, world_size
from vision_ssl.encoders import resolve_encoder
from vision_ssl.simclr import SimCLRModel
from vision_ssl.storage import load_tensors, save_tensors

CPU = torch.device("cpu")
PROCESSES, ROWS = 2, 3  # rows of each process


def global_batch(*shape: int, seed: int) -> Tensor:
    return torch.randn(PROCESSES * ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def simclr_model() -> SimCLRModel:
    torch.manual_seed(0)
    # BatchNorm would see another batch in each process: neither this encoder nor this head has one.
    encoder = resolve_encoder("vit_tiny", image_size=32, patch_size=16).build()
    return SimCLRModel(encoder, hidden=32, dim=16, norm=False, temperature=0.2)


def worker(number: int, folder: Path, port: int) -> None:
    """What one process computes; the tests below look at it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    mine = slice(number * ROWS, (number + 1) * ROWS)
    results: dict[str, Tensor] = {}
    with process_group(CPU):
        results["rank"], results["world size"] = torch.tensor(rank()), torch.tensor(world_size())
        results["one says yes"] = torch.tensor(any_rank(number == 1, CPU))
        results["none says yes"] = torch.tensor(any_rank(False, CPU))

        with rank_zero_first():
            if number == 0:
                time.sleep(0.3)
                (folder / "work").touch()
            results["work is done"] = torch.tensor((folder / "work").exists())

        leaf = global_batch(4, seed=1)[mine].requires_grad_()
        everything = gather(leaf)
        results["gathered"] = everything.detach()
        (everything * global_batch(4, seed=10 + number)).sum().backward()
        results["gradient of gathered"] = gradient(leaf)

        neighbour = torch.zeros(PROCESSES * ROWS, 4, requires_grad=True)
        incoming = torch.full((PROCESSES * ROWS, 4), float(number + 1))
        # Autograd goes backward through the gather first, and hands the same tensor to the product then.
        torch.autograd.backward(2 * neighbour + gather(leaf.detach().requires_grad_()), incoming)
        results["gradient of a neighbour"] = gradient(neighbour)

        model = DistributedDataParallel(simclr_model())
        loss, _ = model(global_batch(3, 32, 32, seed=2)[mine], global_batch(3, 32, 32, seed=3)[mine])
        loss.backward()
        results["loss"] = loss.detach()
        results |= {f"gradient.{name}": gradient(p) for name, p in model.module.named_parameters()}
    results["left"] = torch.tensor(not dist.is_initialized())
    save_tensors(folder / f"{number}.safetensors", results)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(worker, (folder, port), nprocs=PROCESSES, start_method="spawn")
    return [load_tensors(folder / f"{number}.safetensors")[0] for number in range(PROCESSES)]


def test_processes_know_their_place(results: list[dict[str, Tensor]]) -> None:
    assert [result["rank"].item() for result in results] == [0, 1]
    assert [result["world size"].item() for result in results] == [2, 2]
    assert [result["left"].item() for result in results] == [True, True]


def test_one_vote_is_enough_and_all_hear_of_it(results: list[dict[str, Tensor]]) -> None:
    assert [result["one says yes"].item() for result in results] == [True, True]
    assert [result["none says yes"].item() for result in results] == [False, False]


def test_the_first_process_goes_ahead(results: list[dict[str, Tensor]]) -> None:
    assert [result["work is done"].item() for result in results] == [True, True]


def test_gather_gives_every_row_to_everyone(results: list[dict[str, Tensor]]) -> None:
    for result in results:
        assert torch.equal(result["gathered"], global_batch(4, seed=1))


def test_gather_sums_the_gradients_of_all_who_used_a_row(results: list[dict[str, Tensor]]) -> None:
    gradient = torch.cat([result["gradient of gathered"] for result in results])
    torch.testing.assert_close(gradient, global_batch(4, seed=10) + global_batch(4, seed=11))


def test_gather_leaves_the_gradients_of_others_alone(results: list[dict[str, Tensor]]) -> None:
    for number, result in enumerate(results):
        assert torch.equal(result["gradient of a neighbour"], torch.full((PROCESSES * ROWS, 4), 2 * (number + 1.0)))


def test_two_processes_learn_as_one(results: list[dict[str, Tensor]]) -> None:
    model = simclr_model()
    loss, _ = model(global_batch(3, 32, 32, seed=2), global_batch(3, 32, 32, seed=3))
    loss.backward()
    torch.testing.assert_close(torch.stack([result["loss"] for result in results]).mean(), loss.detach())
    for name, parameter in model.named_parameters():
        for result in results:
            error = (result[f"gradient.{name}"] - gradient(parameter)).norm()
            assert error <= 1e-4 * gradient(parameter).norm(), name


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    rows = torch.ones(2, 3)
    with process_group(CPU):
        assert not dist.is_initialized()
        assert (rank(), world_size()) == (0, 1)
        assert gather(rows) is rows
        assert any_rank(True, CPU)
        assert not any_rank(False, CPU)
        with rank_zero_first():
            pass
