import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest
import torch

import vision_ssl
from vision_ssl import hub, registry
from vision_ssl.encoders import resolve_encoder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hubconf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry_points(hubconf: ModuleType) -> dict[str, Callable[..., Any]]:
    """What torch.hub lists: every callable without an underscore."""
    return {name: value for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}


def test_only_models_are_entry_points(hubconf: ModuleType) -> None:
    names = set(entry_points(hubconf))
    assert names == {name.partition(".")[0] for name in vision_ssl.list_models()} | {"encoder"}
    for function in entry_points(hubconf).values():
        assert "features (B, " in (function.__doc__ or "")


def test_dependencies_are_those_of_the_package_but_the_parser_of_its_commands(hubconf: ModuleType) -> None:
    assert [name for name in hubconf.dependencies if importlib.util.find_spec(name) is None] == []
    block = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [\n")[2].partition("]")[0]
    declared = re.findall(r'^    "([\w-]+) >= [\d.]+",$', block, re.MULTILINE)
    imported = {{"pillow": "PIL"}.get(name, name.replace("-", "_")) for name in declared}
    assert {*hubconf.dependencies, "tyro"} == imported


@pytest.mark.parametrize("name", ["mae_vit_small", "simclr_resnet18"])
def test_torch_hub_asks_for_the_model_of_that_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(vision_ssl, "load", lambda name, **options: (name, options))
    asked = torch.hub.load(str(ROOT), name, source="local", num_classes=3)
    assert asked == (name, {"num_classes": 3})


def test_any_encoder_has_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_ssl, "load", lambda name, **options: (name, options))
    asked = torch.hub.load(str(ROOT), "encoder", "hf:me/run", source="local", num_classes=3)
    assert asked == ("hf:me/run", {"num_classes": 3})


def test_no_module_collides_with_another_repository() -> None:
    """torch.hub puts a repository on the path: what lies at its root hides, or is hidden by, another's."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"vision_ssl"}
    assert {path.stem for path in ROOT.glob("*.py")} == {"hubconf"}


def test_from_the_zip_of_a_repository_that_is_not_installed(tmp_path: Path) -> None:
    """All of what torch.hub does with `owner/name:ref`, but for the download."""
    top = "vision-ssl-main"  # as GitHub names it
    with ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(f"{top}/", "")  # what torch.hub takes the folder's name from
        archive.write(ROOT / "hubconf.py", f"{top}/hubconf.py")
        for path in (ROOT / "vision_ssl").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.match("weights/mae*/*"):
                archive.write(path, f"{top}/{path.relative_to(ROOT)}")
    small_stem = resolve_encoder("resnet18", image_size=24, stem="3x3-nopool")
    hub.save(tmp_path / "weights", small_stem.build(), small_stem, card={})
    code = f"""
import shutil, sys
import timm, torch
sys.modules["tyro"] = None  # the one dependency that is not needed here
try:
    timm.create_model({f"local-dir:{tmp_path / 'weights'}"!r}, pretrained=True)
except RuntimeError as error:
    print(error)
torch.hub.set_dir({str(tmp_path / "hub")!r})
torch.hub.download_url_to_file = lambda url, file, **_: shutil.copy({str(tmp_path / "archive.zip")!r}, file)
options = dict(trust_repo=True, skip_validation=True)
encoder = torch.hub.load("owner/vision-ssl:main", "simclr_resnet18", **options)
import vision_ssl
print(encoder.num_features, vision_ssl.__file__)
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": ""}, check=True, capture_output=True, text=True)
    refused, *_, loaded = run.stdout.splitlines()  # torch.hub says in between what it does
    assert refused == "Unknown model (resnet18_3x3_nopool)"  # by timm alone, which must not take it for a resnet18
    assert loaded == f"512 {tmp_path / 'hub' / 'owner_vision-ssl_main' / 'vision_ssl' / '__init__.py'}"


@pytest.mark.parametrize(
    "name", sorted({weights.name.partition(".")[0] for weights in registry.WEIGHTS if weights.is_local})
)
def test_torch_hub_loads_the_model(hubconf: ModuleType, name: str) -> None:
    encoder = torch.hub.load(str(ROOT), name, source="local")
    size = encoder.preprocess.size
    assert encoder(torch.zeros(1, 3, size, size)).shape == (1, encoder.num_features)
    doc = entry_points(hubconf)[name].__doc__ or ""
    assert f"{size} px" in doc
    assert f"(B, {encoder.num_features})" in doc
