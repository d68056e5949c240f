import json
import re
import subprocess
import sys
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import vision_ssl
from benchmarks import package_weights
from benchmarks.package_weights import STEPS, Arguments, thinned
from vision_ssl import hub, registry
from vision_ssl.locate import INDEX_FILE, file_hash
from vision_ssl.recipes import recipe_from_dict

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


@pytest.mark.parametrize(("clone", "divided"), [(False, False), (True, False), (True, True)])
def test_a_run_becomes_weights_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clone: bool, divided: bool
) -> None:
    small = {"image_size": 24, "batch_size": 8, "epochs": 1, "decoder_dim": 16, "decoder_heads": 2}
    recipe = recipe_from_dict({"method": "mae", "encoder": "vit_tiny", **small})
    pixels = torch.randint(0, 256, (8, 3, 24, 24), dtype=torch.uint8)
    run = recipe.train(pixels, out=tmp_path / "run", device="cpu", precision="fp32")
    size = (run.directory / "weights" / "model.safetensors").stat().st_size
    places = {"PACKAGED": tmp_path / "package", "CLONED": tmp_path / "clone"}
    for name, place in places.items():
        for module in (package_weights, registry):
            monkeypatch.setattr(module, name, place)
    monkeypatch.setattr(package_weights, "LARGEST", size // 2 if divided else size)
    results = {"data": "some", "scores": [{"features": name, "accuracy": len(name)} for name in ("other", "run")]}
    (tmp_path / "scores.json").write_text(json.dumps(results))
    package_weights.main(
        Arguments(run.directory, "mae_test.data", (tmp_path / "scores.json",), "run", "A licence.", clone=clone)
    )
    printed = capsys.readouterr().out
    entry: registry.Weights = eval(printed[printed.rindex("Weights(") :], {"Weights": registry.Weights})
    monkeypatch.setattr(registry, "WEIGHTS", (entry,))
    folder = places["CLONED" if clone else "PACKAGED"] / "mae_test.data"
    assert entry.directory == folder
    assert entry.sha256 == {path.name: file_hash(path) for path in folder.glob("*.safetensors*")}
    assert (folder / INDEX_FILE).exists() == divided == (not (folder / "model.safetensors").exists())
    encoder = vision_ssl.load("mae_test")
    assert encoder.card["scores"] == [{"data": "some", "accuracy": 3}]
    assert encoder.card["licence"] == "A licence."
    expected = hub.load(run.directory).state_dict()
    torch.testing.assert_close(encoder.state_dict(), expected, rtol=0, atol=0)
