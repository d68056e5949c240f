import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vision_ssl
from vision_ssl import hub
from vision_ssl.encoders import sincos_position_embedding
from vision_ssl.errors import DataError, RecipeError, VisionSSLError, WeightsError
from vision_ssl.extra.export import export
from vision_ssl.mae import patchify
from vision_ssl.recipes import MAE, Recipe, SimCLR
from vision_ssl.restore import random_encoder, recipe_of, reconstruct

VIT = MAE(encoder="vit_tiny", image_size=32, patch_size=8, decoder_dim=16, decoder_depth=1, decoder_heads=2)
PIXELS = MAE(encoder="resnet18", image_size=32, stem="7x7", mask_unit="pixel", shared_mask=True, norm_pix=False)
RNG = np.random.default_rng(0)
# Not all of one size, nor all in colour.
PICTURES = [
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)) for shape in ((40, 50, 3), (64, 64), (32, 32, 3))
]


def save(recipe: Recipe, folder: Path) -> Path:
    torch.manual_seed(1)
    model: Any = recipe.build()
    hub.save(folder, model.encoder, recipe.encoder_spec(), card={"recipe": recipe.to_dict()}, head=model.head)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an MAE; no test changes them."""
    return save(VIT, tmp_path_factory.mktemp("vit"))


def removed_patches(masked: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    return (patchify(masked, 8) != patchify(original, 8)).any(dim=2)


def test_the_recipe_comes_back(vit: Path) -> None:
    assert recipe_of(vit) == VIT


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({}, "has no recipe in its card: expected weights that this package trained"),
        ({"recipe": {"method": "dino"}}, "method='dino' is unknown"),
        ({"recipe": {"method": ["mae"]}}, "is unknown"),
        ({"recipe": {"method": "mae", "mask_ratio": "most"}}, "recipe|mask_ratio"),
        ({"recipe": {"method": "mae", "optimizer": "x" * 10_000}}, "has a recipe that is none: optimizer='x"),
        ({"recipe": ["mae"]}, "recipe"),
        ({"recipe": None}, "recipe"),
    ],
    ids=lambda case: str(case)[:60],
)
def test_cards_without_a_usable_recipe(vit: Path, tmp_path: Path, card: dict[str, Any], message: str) -> None:
    config = json.loads((vit / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_ssl": card}))
    with pytest.raises(VisionSSLError, match=message) as refusal:
        recipe_of(tmp_path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("recipe", [VIT, PIXELS, SimCLR(encoder="vit_tiny", image_size=32, patch_size=8)], ids=repr)
def test_all_of_a_model_comes_back(tmp_path: Path, recipe: Recipe) -> None:
    torch.manual_seed(1)
    trained: Any = recipe.build()
    hub.save(tmp_path, trained.encoder, recipe.encoder_spec(), card={"recipe": recipe.to_dict()}, head=trained.head)
    model: Any = vision_ssl.load(tmp_path, part="full")
    assert type(model) is type(trained)
    assert not model.training
    expected = {
        name: tensor.half().float() for name, tensor in trained.state_dict().items() if tensor.is_floating_point()
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    alone = vision_ssl.load(tmp_path)
    assert (model.card, model.preprocess) == (alone.card, alone.preprocess)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.encoder(images), alone(images))  # the mask is training's alone
    bare = vision_ssl.load(tmp_path, part="full", pretrained=False, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in bare.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "sizes",
    [
        {"decoder_dim": 2**40, "decoder_heads": 1},
        {"decoder_dim": 2**15, "decoder_heads": 1, "decoder_depth": 20},
        {"decoder_depth": 10**9},
        {"image_size": 2**20},
        {"image_size": 2**40, "patch_size": 2**20},
        {"image_size": 10**30, "patch_size": 10**29},
        {"encoder": "vit_huge"},
        {"encoder": "resnet50", "norm_pix": False},
    ],
    ids=str,
)
def test_a_recipe_that_would_fill_the_memory(vit: Path, tmp_path: Path, sizes: dict[str, Any]) -> None:
    for file in vit.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((vit / "config.json").read_text())
    config["vision_ssl"]["recipe"] |= sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for whole in (
        lambda: vision_ssl.load(tmp_path, part="full"),
        lambda: vision_ssl.load(tmp_path, part="full", pretrained=False),
        lambda: random_encoder(tmp_path),
        lambda: reconstruct(tmp_path, PICTURES),
        lambda: export(tmp_path, tmp_path / "out", format="transformers"),
    ):
        with pytest.raises(
            WeightsError, match=r"does not fit|cannot be built|for .* numbers|holds a vit_tiny|1e\+09 blocks"
        ) as refusal:
            whole()
        assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # kB


def test_what_a_whole_model_does_not_take(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^img_size, num_classes: part='full' takes pretrained, dtype, device, cache_"
    ):
        vision_ssl.load(vit, part="full", img_size=64, num_classes=3)
    with pytest.raises(RecipeError, match=r"^part='head' is unknown: expected encoder or full$"):
        vision_ssl.load(vit, part="head")  # type: ignore[call-overload]  # what mypy refuses is the test
    config = json.loads((vit / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_ssl": {}}))
    with pytest.raises(WeightsError, match="has no recipe in its card"):
        vision_ssl.load(tmp_path, part="full")


def test_the_encoder_before_training(vit: Path) -> None:
    encoder, trained = random_encoder(vit), vision_ssl.load(vit)
    images = torch.rand(2, 3, 32, 32)
    assert encoder.state_dict().keys() == trained.state_dict().keys()
    assert (encoder.preprocess, encoder.card, encoder.training) == (trained.preprocess, {}, False)
    assert not torch.equal(encoder.get_parameter("cls_token"), trained.get_parameter("cls_token"))
    assert torch.equal(encoder(images), random_encoder(vit)(images))
    assert not torch.equal(encoder(images), random_encoder(vit, seed=1)(images))
    # As it stands at step 0: with MAE's fixed position embedding.
    assert torch.equal(encoder.get_parameter("pos_embed"), sincos_position_embedding(192, 4, prefix_tokens=1))


def test_a_reconstruction_keeps_what_was_shown(vit: Path) -> None:
    original, masked, predicted = reconstruct(vit, PICTURES)
    assert original.shape == masked.shape == predicted.shape == (3, 3, 32, 32)
    preprocess = vision_ssl.load(vit).preprocess
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (preprocess.mean, preprocess.std))
    torch.testing.assert_close(original, torch.stack([preprocess(picture) * std + mean for picture in PICTURES]))
    assert original.min() >= -1e-6
    assert original.max() <= 1 + 1e-6
    removed = removed_patches(masked, original)
    assert removed.sum(dim=1).tolist() == [12, 12, 12]  # three quarters of 16 patches
    assert not torch.equal(removed[0], removed[1])
    torch.testing.assert_close(masked, torch.where(patches_to_pixels(removed), mean, original))
    assert torch.equal(removed_patches(predicted, original), removed)


def patches_to_pixels(removed: torch.Tensor) -> torch.Tensor:
    grid = removed.view(-1, 1, 4, 4)
    return grid.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_the_seed_and_the_ratio_choose_what_is_removed(vit: Path) -> None:
    original, masked, _ = reconstruct(vit, PICTURES, mask_ratio=0.5)
    assert removed_patches(masked, original).sum(dim=1).tolist() == [8, 8, 8]
    assert torch.equal(reconstruct(vit, PICTURES, mask_ratio=0.5)[1], masked)
    assert not torch.equal(reconstruct(vit, PICTURES, mask_ratio=0.5, seed=1)[1], masked)
    with pytest.raises(RecipeError, match=r"mask_ratio=1\.5 is out of range"):
        reconstruct(vit, PICTURES, mask_ratio=1.5)


def test_the_trained_decoder_predicts(vit: Path, tmp_path: Path) -> None:
    model: Any = VIT.build()
    hub.load_into(model, vit, head_required=True)
    nn.init.zeros_(model.head.pixels.weight)
    nn.init.zeros_(model.head.pixels.bias)
    hub.save(tmp_path, model.encoder, VIT.encoder_spec(), card={"recipe": VIT.to_dict()}, head=model.head)
    original, masked, predicted = reconstruct(tmp_path, PICTURES)
    # What is predicted are pixels normalised within their patch: zero is the patch's mean colour over its channels.
    shift, scale = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (original - shift[:, None, None]) / scale[:, None, None]
    mean = patchify(normalised, 8).mean(dim=2, keepdim=True).expand(-1, -1, 192)
    removed = removed_patches(masked, original)
    expected = (mean.unflatten(2, (64, 3)) * scale + shift).flatten(2)
    torch.testing.assert_close(patchify(predicted, 8)[removed], expected[removed], atol=1e-4, rtol=1e-4)


def test_a_resnet_reconstructs_pixels(tmp_path: Path) -> None:
    original, masked, predicted = reconstruct(save(PIXELS, tmp_path), PICTURES, mask_ratio=0.5)
    removed = (masked != original).any(dim=1)
    assert abs(removed.float().mean() - 0.5) < 0.01
    shown = ~removed[:, None].expand_as(original)
    torch.testing.assert_close(predicted[shown], original[shown])


def test_what_cannot_be_reconstructed(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images: got none, expected at least one"):
        reconstruct(vit, [])
    simclr = SimCLR(encoder="vit_tiny", image_size=32, patch_size=8)
    with pytest.raises(WeightsError, match="was trained by simclr: expected mae, which can reconstruct"):
        reconstruct(save(simclr, tmp_path / "simclr"), PICTURES)
    without = save(VIT, tmp_path / "without")
    (without / "head.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"head\.safetensors is not there"):
        reconstruct(without, PICTURES)
    many = save(replace(VIT, channels=5), tmp_path / "channels")
    with pytest.raises(DataError, match="a picture has 1 or 3 channels, this encoder takes 5"):
        reconstruct(many, PICTURES)
