import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vision_ssl
from vision_ssl import cli, hub
from vision_ssl.encoders import EncoderSpec, resolve_encoder
from vision_ssl.errors import MissingExtraError, WeightsError
from vision_ssl.extra.convert import convert
from vision_ssl.extra.export import Format, export
from vision_ssl.mae import random_mask
from vision_ssl.recipes import MAE

RESNET = resolve_encoder("resnet18", image_size=24, stem="3x3-nopool")
RECIPE = MAE(
    encoder="vit_tiny",
    image_size=24,
    patch_size=8,
    norm_pix=False,
    mask_ratio=0.5,
    decoder_dim=32,
    decoder_depth=2,
    decoder_heads=2,
)
VIT = RECIPE.encoder_spec()
IMAGES = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an MAE with all tensors at random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mae"
    model: Any = RECIPE.build()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    hub.save(path, model.encoder, VIT, card={"recipe": RECIPE.to_dict(), "licence": "mine"}, head=model.head)
    return path


def saved(folder: Path, spec: EncoderSpec) -> Path:
    """Weights of an encoder alone."""
    torch.manual_seed(0)
    hub.save(folder, spec.build(), spec, card={})
    return folder


def difference(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / second.abs().max()).item()


@torch.no_grad()
def test_a_mae_in_transformers(mae: Path, tmp_path: Path) -> None:
    from transformers import ViTMAEForPreTraining

    assert export(mae, tmp_path / "out", format="transformers") == tmp_path / "out" / "model.safetensors"
    theirs, loading = ViTMAEForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    ours: Any = RECIPE.build().eval()
    hub.load_into(ours, mae, head_required=True)
    noise = torch.rand(len(IMAGES), 9, generator=torch.Generator().manual_seed(1))
    output = theirs.eval()(IMAGES, noise=noise)
    keep, mask = random_mask(noise, RECIPE.mask_ratio)
    assert torch.equal(output.mask, mask)
    assert difference(ours.predict(IMAGES, keep, mask), output.logits) < 3e-6
    torch.testing.assert_close(output.loss, ours(IMAGES, noise)[0])


@torch.no_grad()
def test_a_vit_in_transformers(tmp_path: Path) -> None:
    from transformers import ViTModel

    export(saved(tmp_path / "weights", VIT), tmp_path / "out", format="transformers")
    theirs, loading = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False, output_loading_info=True)
    assert not any(loading.values())
    ours = vision_ssl.load(tmp_path / "weights")
    assert difference(theirs.eval()(IMAGES).last_hidden_state, ours.forward_features(IMAGES)) < 1e-6


def test_a_card_need_not_list_hashes(mae: Path, tmp_path: Path) -> None:
    for file in mae.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((mae / "config.json").read_text())
    del config["vision_ssl"]["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    export(tmp_path, tmp_path / "out", format="transformers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "vit_mae"


def test_what_is_exported_comes_back(mae: Path, tmp_path: Path) -> None:
    export(mae, tmp_path / "out", format="transformers")
    result = convert(tmp_path / "out" / "model.safetensors", tmp_path / "back")
    assert result.left_out == ()
    assert result.notes == ("pooled features are the mean of the normed patch tokens, whatever the original pools",)
    for file in ("model.safetensors", "head.safetensors"):
        ours, back = load_file(mae / file), load_file(tmp_path / "back" / file)
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[name], back[name]) for name in ours)
    recipe = json.loads((tmp_path / "back" / "config.json").read_text())["vision_ssl"]["recipe"]
    assert recipe.items() <= RECIPE.to_dict().items()


def run_torch_export(path: Path, images: Tensor) -> Tensor:
    features: Tensor = torch.export.load(path).module()(images)
    return features


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(given.name, given.shape[1:]) for given in session.get_inputs()] == [("images", [3, 24, 24])]
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


@pytest.mark.parametrize(
    ("format", "file", "spec", "run"),
    [("torch.export", "model.pt2", RESNET, run_torch_export), ("onnx", "model.onnx", VIT, run_onnx)],
    ids=["torch.export", "onnx"],
)
@torch.no_grad()
def test_exported_features_of_any_batch(
    tmp_path: Path, format: Format, file: str, spec: EncoderSpec, run: Callable[[Path, Tensor], Tensor]
) -> None:
    weights = saved(tmp_path / "weights", spec)
    assert export(weights, tmp_path / "out", format=format) == tmp_path / "out" / file
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["card.json", file]
    encoder = vision_ssl.load(weights)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 24, 24)
        assert difference(run(tmp_path / "out" / file, images), encoder(images)) < 1e-6


def test_what_differs_from_the_encoder_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(images: Tensor) -> Tensor:
        return torch.zeros(len(images), 512)

    weights = saved(tmp_path / "weights", RESNET)
    monkeypatch.setattr(torch.export, "load", lambda file: SimpleNamespace(module=lambda: other))
    with pytest.raises(WeightsError, match=r"model\.pt2 would differ from the encoder by .* of the largest feature"):
        export(weights, tmp_path / "out", format="torch.export")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_card_travels_along(mae: Path, tmp_path: Path) -> None:
    export(mae, tmp_path / "out", format="transformers")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card.pop("input") == {
        "shape": ["batch", 3, 24, 24],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert card == hub.read_card(mae)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(mae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'^{package} is not installed: pip install "vision-ssl\[onnx\]"$'):
        export(mae, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_transformers_has_no_form_for_our_resnets(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a ResNet: expected a ViT for format='transformers'"):
        export(saved(tmp_path / "weights", RESNET), tmp_path / "out", format="transformers")
    assert not (tmp_path / "out").exists()


def test_the_command(mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["export", str(mae), "-o", str(tmp_path / "out"), "--format", "transformers"])
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'model.safetensors'}\n"
    with pytest.raises(SystemExit, match=r"^error: out='.*' is there already: expected a new or an empty folder$"):
        cli.main(["export", str(mae), "-o", str(mae), "--format", "transformers"])
    assert hub.read_card(mae)["licence"] == "mine"
