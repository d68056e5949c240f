import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vision_ssl
from vision_ssl import registry

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


def test_dependencies_can_be_imported(hubconf: ModuleType) -> None:
    assert [name for name in hubconf.dependencies if importlib.util.find_spec(name) is None] == []
    assert "torch" in hubconf.dependencies


@pytest.mark.parametrize("name", ["mae_vit_small", "simclr_resnet18"])
def test_torch_hub_asks_for_the_model_of_that_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(vision_ssl, "load", lambda name, **options: (name, options))
    asked = torch.hub.load(str(ROOT), name, source="local", num_classes=3)
    assert asked == (name, {"num_classes": 3})


@pytest.mark.parametrize("name", sorted({weights.name.partition(".")[0] for weights in registry.WEIGHTS}))
def test_torch_hub_loads_the_model(hubconf: ModuleType, name: str) -> None:
    encoder = torch.hub.load(str(ROOT), name, source="local")
    size = encoder.preprocess.size
    assert encoder(torch.zeros(1, 3, size, size)).shape == (1, encoder.num_features)
    doc = entry_points(hubconf)[name].__doc__ or ""
    assert f"{size} px" in doc
    assert f"(B, {encoder.num_features})" in doc
