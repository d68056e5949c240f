import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Labelled images in two splits: two classes, of twelve dark and twelve bright images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, brightness in (("bright", 180), ("dark", 60)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = rng.normal(brightness, 30, size=(48, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_have_a_test(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 50
    assert f'example("{path.stem}")' in Path(__file__).read_text()
    assert example(path.stem).__doc__


def test_compare_models(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("compare_models").main(str(source))
    assert "simclr_resnet18 - mae_vit_small: " in capsys.readouterr().out


def test_finetune(source: Path) -> None:
    assert example("finetune").main(str(source), steps=3) >= 50


def test_pretrain_on_a_folder(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    settings = {"epochs": 1, "batch_size": 12, "device": "cpu", "look_epochs": 0}
    example("pretrain_on_a_folder").main(str(source), str(out), **settings)
    assert "features (24, 512) of the same images" in capsys.readouterr().out
    assert (out / "weights" / "model.safetensors").is_file()


def test_reconstruct_images(source: Path, tmp_path: Path) -> None:
    example("reconstruct_images").main(str(tmp_path / "out.png"), *map(str, source.glob("val/dark/1*.png")))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-0.5.png", "out-0.75.png"]


def test_reconstruct_the_packaged_photographs(tmp_path: Path) -> None:
    example("reconstruct_images").main(str(tmp_path / "out.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_search_by_image(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("search_by_image").main(str(source / "train" / "dark" / "3.png"), str(source))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].endswith("dark/3.png")  # the image itself is the closest
    assert lines[0].startswith("1.000")
