"""Hostile files: whatever a config or a safetensors header says, there is a clean error or a good answer."""

import json
import os
import resource
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from vision_ssl import hub
from vision_ssl.config import read_config, to_config
from vision_ssl.encoders import resolve_encoder
from vision_ssl.errors import VisionSSLError
from vision_ssl.storage import load_tensors

# Hypothesis chooses a seed, and what it does to the files is drawn from it: choosing each value would take 20 times as
# long.
CASES = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**64 - 1).map(Random)
NUMBERS = [0, 1, -1, 3, 8, 24, 224, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, float("nan"), float("inf")]
VALUES = [
    *NUMBERS,
    None,
    True,
    [],
    {},
    "",
    "resnet18",
    "F16",
    "..",
    "\0\n",
    "x" * 10_000,
    [[3, 2], [0, 12]],
    {"a": [1]},
]
CONFIGS = [
    to_config(resolve_encoder(name, image_size=24, patch_size=8), 192, {"sha256": {"model.safetensors": "0" * 64}})
    for name in ("vit_tiny", "resnet18")
]
TENSORS = {"weight": torch.ones(3, 2, dtype=torch.float16), "bias": torch.zeros(3, dtype=torch.float16)}


def changed(data: Any, draw: Random) -> Any:
    """The same JSON with something else in one place, or without it."""
    if not isinstance(data, dict | list) or not data or draw.random() < 0.2:
        return draw.choice(VALUES)
    if isinstance(data, list):
        index = draw.randrange(len(data))
        return [*data[:index], changed(data[index], draw), *data[index + 1 :]]
    key = draw.choice(sorted(data))
    if draw.random() < 0.1:
        return {name: value for name, value in data.items() if name != key}
    return data | {key: changed(data[key], draw)}


def flipped(content: bytes, draw: Random) -> bytes:
    """The same bytes, some of them others, and perhaps cut."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        damaged[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(damaged[: draw.randint(0, len(content)) if draw.random() < 0.2 else len(content)])


def assert_clean(error: VisionSSLError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


@CASES
@given(SEEDS)
def test_configs(tmp_path: Path, draw: Random) -> None:
    path = tmp_path / "config.json"
    content = json.dumps(changed(draw.choice(CONFIGS), draw)).encode()
    path.write_bytes(flipped(content, draw) if draw.random() < 0.5 else content)
    try:
        spec, card = read_config(path)
    except VisionSSLError as error:
        assert_clean(error)
    else:  # nothing that would take long to build, or that timm would open files for
        assert spec.args.keys() <= {"img_size", "patch_size", "global_pool", "fc_norm"}
        assert spec.channels * spec.args.get("patch_size", 7) ** 2 <= 1 << 17
        assert isinstance(card, dict)


def with_header(header: object, content: bytes = bytes(18)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def read(path: Path) -> None:
    tensors, _ = load_tensors(path)
    hub._fill(nn.Linear(2, 3), path, tensors)


@CASES
@given(SEEDS)
def test_headers_of_safetensors(tmp_path: Path, draw: Random) -> None:
    content = save(TENSORS, {"format": "pt", "facts": "[1, 2]"})
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if draw.random() < 0.5:
        content = with_header(changed(header, draw), content[8 + length :])
    else:
        content = flipped(content, draw)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        read(path)
    except VisionSSLError as error:
        assert_clean(error)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"weight": entry("F16", [2**39], 0, 2**40)},  # a terabyte
        {"weight": entry("F16", [2**39], 0, 18)},
        {"weight": entry("F16", [2**62, 2**62], 0, 18)},
        {"weight": entry("F16", [3, 2], 0, 12), "bias": entry("F16", [3], 6, 12)},  # over each other
        {"weight": entry("F16", [3, 2], 0, 12), "bias": entry("F16", [3], 12, 18), "more": entry("F16", [3], 12, 18)},
        {"weight": entry("F16", [3, 2], 6, 18)},  # a hole before it
        {"weight": entry("F16", [3, 2], 12, 0)},
        {"weight": entry("F16", [-3, 2], 0, 12)},
        {"weight": entry("F99", [3, 2], 0, 12)},
        {"weight": entry("F16", [3, 2], 0, 12)} | {f"more{number}": entry("F16", [0], 12, 12) for number in range(99)},
    ],
    ids=lambda header: str(header)[:60],
)
def test_headers_that_lie(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(header))
    with pytest.raises(VisionSSLError) as refusal:
        read(path)
    assert_clean(refusal.value)


OTHER_TYPES = ["F64", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64"]


@pytest.mark.parametrize("dtype", OTHER_TYPES)
def test_other_types_of_numbers(tmp_path: Path, dtype: str) -> None:
    width = {"F64": 8, "I64": 8, "C64": 8, "BF16": 2, "F4": 0.5}.get(dtype, 1)
    weight, bias = int(6 * width), int(4 * width)
    header = {"weight": entry(dtype, [3, 2], 0, weight), "bias": entry(dtype, [4], weight, weight + bias)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(header, b"\0" * (weight + bias)))
    model = nn.ParameterDict({"weight": torch.ones(3, 2), "bias": torch.ones(4)})
    if dtype in ("F64", "BF16", "I64"):
        hub._fill(model, path, load_tensors(path)[0])
        assert not model["weight"].any()
    else:
        with pytest.raises(VisionSSLError) as refusal:
            hub._fill(model, path, load_tensors(path)[0])
        assert_clean(refusal.value)


@pytest.mark.parametrize("size", [2**32, 2**40], ids=["4 GB", "1 TB"])
def test_a_file_that_is_larger_than_what_it_should_be(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"weight": entry("F16", [size // 2], 0, size)}, b""))
    os.truncate(path, path.stat().st_size + size)  # sparse: it takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VisionSSLError) as refusal:
        read(path)
    assert_clean(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kB


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "{"], ids=["deep", "long", "open"])
def test_facts_that_are_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}, {"facts": text}))
    assert load_tensors(path)[1] == {"facts": text}
