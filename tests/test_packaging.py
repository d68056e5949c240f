import json
import re
import subprocess
import sys
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

import vision_ssl
from benchmarks.package_weights import STEPS, thinned

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    out = tmp_path_factory.mktemp("dist")
    # The backend that pyproject.toml names, without an environment of its own: no network, and two seconds.
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with ZipFile(next(out.glob("*.whl"))) as archive:
        yield archive


def test_wheel_holds_the_package_and_nothing_else(wheel: ZipFile) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vision_ssl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files
    assert "vision_ssl/py.typed" in packed
    for folder in ("assets", "weights"):
        assert any(name.startswith(f"vision_ssl/{folder}/") for name in packed), folder


def test_wheel_describes_itself(wheel: ZipFile) -> None:
    info = f"vision_ssl-{vision_ssl.__version__}.dist-info"
    metadata = HeaderParser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == vision_ssl.__version__
    assert metadata["License-Expression"] == "MIT"
    assert "vision-ssl = vision_ssl.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert b"The vision_ssl authors" in wheel.read(f"{info}/licenses/LICENSE")


def test_extras_stay_out_of_the_core(wheel: ZipFile) -> None:
    metadata = wheel.read(f"vision_ssl-{vision_ssl.__version__}.dist-info/METADATA").decode()
    requirements = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata, re.MULTILINE)
    core = {name for name, rest in requirements if "extra ==" not in rest}
    assert core == {
        "huggingface-hub",
        "numpy",
        "pillow",
        "safetensors",
        "timm",
        "torch",
        "torchvision",
        "tqdm",
        "tyro",
    }


@pytest.mark.parametrize("steps", [10, STEPS - 1, 3 * STEPS + 5])
def test_packaged_metrics_keep_looks_and_the_last_step(steps: int) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, steps + 1)]
    lines += [json.dumps({"step": steps, "knn_accuracy": 5.0})]
    lines.insert(7, json.dumps({"step": 7, "knn_accuracy": 3.0}))
    kept = [json.loads(line) for line in thinned("\n".join(lines) + "\n").splitlines()]
    seen = [entry["step"] for entry in kept if "loss" in entry]
    assert [entry["step"] for entry in kept if "loss" not in entry] == [7, steps]
    assert len(seen) <= STEPS
    assert seen[-1] == steps
    if steps < STEPS:
        assert seen == list(range(1, steps + 1))
