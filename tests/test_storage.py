import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_ssl import storage
from vision_ssl.checkpoint import load_checkpoint, save_checkpoint
from vision_ssl.errors import CheckpointError
from vision_ssl.optim import build_optimizer
from vision_ssl.storage import load_tensors, save_json, save_tensors, save_text

FACTS = {"step": 7, "seconds": 0.1, "name": "größe", "nested": {"a": [1, None]}}


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[0.1, -0.0], [float("inf"), float("nan")]]),
        torch.arange(6, dtype=torch.float16).reshape(2, 3).T,  # not contiguous
        torch.tensor(3, dtype=torch.int64),  # no dimension
        torch.zeros(0, 4, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last),
        nn.Parameter(torch.randn(5)),
    ],
    ids=["special values", "transposed", "scalar", "empty", "bool", "channels last", "parameter"],
)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, tensor: Tensor) -> None:
    save_tensors(tmp_path / "new" / "file.safetensors", {"a.b": tensor}, FACTS)
    tensors, facts = load_tensors(tmp_path / "new" / "file.safetensors")
    assert list(tensors) == ["a.b"]
    assert (tensors["a.b"].dtype, tensors["a.b"].shape) == (tensor.dtype, tensor.shape)
    assert raw(tensors["a.b"]) == raw(tensor)
    assert facts == FACTS


def test_json_is_readable(tmp_path: Path) -> None:
    save_json(tmp_path / "facts.json", FACTS)
    text = (tmp_path / "facts.json").read_text(encoding="utf-8")
    assert json.loads(text) == FACTS
    assert "größe" in text
    assert text.endswith("}\n")


def test_file_from_elsewhere_keeps_its_text(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"format": "pt", "by": "somebody"})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"by": "somebody"}


def full_disk(beside: Path, text: str, encoding: str) -> None:
    with beside.open("w", encoding=encoding) as file:
        file.write(text[: len(text) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside))


def full_disk_for_tensors(tensors: dict[str, Tensor], beside: Path, metadata: dict[str, str]) -> None:
    full_disk(beside, "half a file", "utf-8")


def fails(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("step", ["write", "sync", "rename"])
@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: str
) -> None:
    path = tmp_path / "file"

    def save(number: float) -> None:
        if kind == "text":
            save_text(path, str(number))
        else:
            save_tensors(path, {"x": torch.full((100,), number)})

    save(1.0)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if step == "sync":
            patch.setattr(os, "fsync", fails)
        elif step == "rename":
            patch.setattr(Path, "replace", fails)
        elif kind == "text":
            patch.setattr(Path, "write_text", full_disk)
        else:
            patch.setattr(storage, "save_file", full_disk_for_tensors)
        with pytest.raises(CheckpointError, match=r"^cannot write .*file: .*; what was there before is unharmed$"):
            save(2.0)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["file"]
    save(3.0)
    assert path.read_bytes() != before
    assert files(tmp_path) == ["file"]


def test_disk_that_really_refuses(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tensors(path, {"x": torch.zeros(1)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save_tensors(path, {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["file"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.zeros(1)})
    seen: list[float] = []

    def slow(tensors: dict[str, Tensor], beside: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, beside, metadata)
        seen.append(load_tensors(path)[0]["x"].item())

    monkeypatch.setattr(storage, "save_file", slow)
    save_tensors(path, {"x": torch.ones(1)})
    assert seen == [0.0]
    assert load_tensors(path)[0]["x"].item() == 1.0


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    save_text(tmp_path / "taken", "")
    with pytest.raises(CheckpointError, match=r"cannot write .*taken/x"):
        save_text(tmp_path / "taken" / "x", "")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name} is not there$"):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not safetensors", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged or not a safetensors file"):
        load_tensors(tmp_path / "x.safetensors")


def small_run(optimizer: str = "adamw", width: int = 3) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    return model, build_optimizer(optimizer, model, lr=0.1, weight_decay=0.01, betas=(0.9, 0.99))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        model(torch.randn(8, 2, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    tensors = dict(model.state_dict())
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{name}": value for name, value in state.items()}
    return {name: raw(tensor) for name, tensor in tensors.items()}


def test_checkpoint_cut_at_any_byte_is_refused_by_name(tmp_path: Path) -> None:
    model, optimizer = small_run()
    steps(model, optimizer, seed=0)
    path = tmp_path / "cut"
    save_checkpoint(path, model, optimizer, {"step": 1})
    before = everything(model, optimizer)
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match="cut is damaged"):
            load_checkpoint(path, model, optimizer)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("name", ["lars", "adamw", "adam", "sgd"])
def test_stopped_and_continued_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, optimizer = small_run(name)
    steps(model, optimizer, seed=1)
    assert len(optimizer.state) == 6
    save_checkpoint(tmp_path / "x", model, optimizer, FACTS)
    again, again_optimizer = small_run(name)
    assert load_checkpoint(tmp_path / "x", again, again_optimizer) == FACTS
    assert everything(again, again_optimizer) == everything(model, optimizer)
    steps(model, optimizer, seed=2)
    steps(again, again_optimizer, seed=2)
    assert everything(again, again_optimizer) == everything(model, optimizer)


def test_learning_rate_follows_from_the_recipe_and_not_the_checkpoint(tmp_path: Path) -> None:
    model, optimizer = small_run()
    optimizer.param_groups[0]["lr"] = 5.0
    save_checkpoint(tmp_path / "x", model, optimizer, {})
    again, again_optimizer = small_run()
    load_checkpoint(tmp_path / "x", again, again_optimizer)
    assert [group["lr"] for group in again_optimizer.param_groups] == [0.1, 0.1]


def wider(path: Path) -> None:
    save_checkpoint(path, *small_run(width=4), {})


def deeper(path: Path) -> None:
    model, optimizer = small_run()
    save_checkpoint(path, nn.Sequential(*model, nn.Linear(1, 1)), optimizer, {})


def foreign(path: Path) -> None:
    save_tensors(path, small_run()[0].state_dict())


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (wider, r"belongs to another model: 0.bias has the shape \(4,\) in it, but expected is \(3,\)"),
        (deeper, r"belongs to another model: 3.bias has the shape \(1,\) in it, but expected is None"),
        (foreign, "is not a checkpoint: it holds '0.bias'"),
    ],
)
def test_checkpoint_of_another_model_changes_nothing(
    tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path / "x")
    model, optimizer = small_run()
    steps(model, optimizer, seed=0)
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'x'} {reason}$"):
        load_checkpoint(tmp_path / "x", model, optimizer)
    assert everything(model, optimizer) == before
