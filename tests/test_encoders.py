import logging
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vision_ssl.encoders import (
    ENCODERS,
    RESNETS,
    VITS,
    feature_dim,
    fix_position_embedding,
    resize_input,
    resolve_encoder,
    resolve_patch_size,
    sincos_position_embedding,
)
from vision_ssl.errors import RecipeError

WIDTHS = {
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "vit_tiny": 192,
    "vit_small": 384,
    "vit_base": 768,
    "vit_large": 1024,
    "vit_huge": 1280,
}
# Millions of parameters without a classifier, of the architectures at 224 px.
SIZES = {
    "resnet18": 11.18,
    "resnet34": 21.28,
    "resnet50": 23.51,
    "vit_tiny": 5.52,
    "vit_small": 21.67,
    "vit_base": 85.80,
    "vit_large": 303.30,
    "vit_huge": 630.92,  # with patches of 16 px
}


def small_vit(image_size: int = 32) -> Any:
    return resolve_encoder("vit_tiny", image_size=image_size, patch_size=8).build().eval()


@pytest.mark.parametrize(("image_size", "channels"), [(32, 1), (64, 5), (224, 3)])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_gives_pooled_features(name: str, image_size: int, channels: int) -> None:
    spec = resolve_encoder(name, image_size=image_size, channels=channels)
    with torch.device("meta"):  # shapes without the arithmetic
        encoder = spec.build().eval()
        features = encoder(torch.empty(2, channels, image_size, image_size))
    assert features.shape == (2, WIDTHS[name])
    assert feature_dim(encoder) == WIDTHS[name]
    assert spec.is_vit == name.startswith("vit")
    if image_size == 224:
        assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.01)


def test_a_head_joins_on_request() -> None:
    with torch.device("meta"):
        for name in ("resnet18", "vit_tiny"):
            classifier = resolve_encoder(name, image_size=32).build(num_classes=7)
            assert classifier(torch.empty(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("image_size", "stem", "architecture", "side"),
    [
        (32, "auto", "resnet18_3x3_nopool", 4),
        (40, "auto", "resnet18_3x3_nopool", 5),
        (41, "auto", "resnet18_3x3", 3),
        (64, "auto", "resnet18_3x3", 4),
        (96, "auto", "resnet18_3x3", 6),
        (97, "auto", "resnet18", 4),
        (224, "auto", "resnet18", 7),
        (64, "7x7", "resnet18", 2),
        (60, "7x7", "resnet18", 2),
        (64, "3x3-nopool", "resnet18_3x3_nopool", 8),
    ],
)
def test_stems(image_size: int, stem: str, architecture: str, side: int) -> None:
    spec = resolve_encoder("resnet18", image_size=image_size, stem=stem)
    assert spec.architecture == architecture
    with torch.device("meta"):
        encoder: Any = spec.build()
        maps = encoder.forward_features(torch.empty(1, 3, image_size, image_size))
    assert maps.shape == (1, 512, side, side)


@pytest.mark.parametrize("resnet", RESNETS)
def test_small_stem_is_one_3x3_convolution_and_the_rest_is_timms(resnet: str) -> None:
    with torch.device("meta"):
        small: Any = timm.create_model(f"{resnet}_3x3")
        bare = timm.create_model(f"{resnet}_3x3_nopool")
        plain = timm.create_model(resnet)
    assert small.conv1.kernel_size == (3, 3)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, nn.MaxPool2d)
    assert isinstance(bare.maxpool, nn.Identity)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()} | {
        "conv1.weight": torch.Size((64, 3, 3, 3))
    }
    assert {name: tensor.shape for name, tensor in small.state_dict().items()} == shapes
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == shapes


def test_timm_builds_small_stems_by_name_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), torch.device("meta"):
        for resnet in RESNETS:
            for stem, side in (("3x3", 64), ("3x3_nopool", 32)):
                encoder: Any = timm.create_model(f"{resnet}_{stem}", in_chans=1, num_classes=0)
                assert encoder.pretrained_cfg["input_size"] == (3, side, side)
                assert encoder.pretrained_cfg["first_conv"] == "conv1"
                assert encoder.pretrained_cfg["classifier"] == "fc"
                assert not timm.models.is_model_pretrained(f"{resnet}_{stem}")
    assert caplog.records == []


def test_stem_starts_with_the_scale_of_timms_other_convolutions() -> None:
    torch.manual_seed(0)
    encoder: Any = resolve_encoder("resnet18", image_size=64).build()
    assert encoder.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)


def test_plain_resnet_refuses_small_stem_weights() -> None:
    with torch.device("meta"):
        weights = timm.create_model("resnet18_3x3").state_dict()
        with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
            timm.create_model("resnet18").load_state_dict(weights, assign=True)


def test_pooled_features_are_the_mean_of_the_normed_patch_tokens() -> None:
    torch.manual_seed(0)
    vit = small_vit()
    nn.init.normal_(vit.norm.weight)
    nn.init.normal_(vit.norm.bias)
    images = torch.randn(2, 3, 32, 32)
    tokens = vit.forward_features(images)
    assert tokens.shape == (2, 17, 192)
    torch.testing.assert_close(vit(images), tokens[:, 1:].mean(dim=1))

    before_norm = []
    vit.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    vit.forward_features(images)
    torch.testing.assert_close(tokens, vit.norm(before_norm[0]))


@pytest.mark.parametrize("name", ENCODERS)
def test_weights_load_in_plain_timm(name: str) -> None:
    spec = resolve_encoder(name, image_size=64, stem="7x7", channels=5)
    with torch.device("meta"):
        theirs = timm.create_model(spec.architecture, num_classes=0, in_chans=5, **spec.args)
        theirs.load_state_dict(spec.build().state_dict(), assign=True)
    assert spec.architecture in timm.list_models(module="resnet" if name in RESNETS else "vision_transformer")


def test_position_embedding_by_the_formula() -> None:
    dim, grid = 12, 5
    table = sincos_position_embedding(dim, grid, prefix_tokens=2)
    assert table.shape == (1, 2 + grid * grid, dim)
    assert table.dtype == torch.float32
    assert not table[0, :2].any()
    for row in range(grid):
        for column in range(grid):
            expected = []
            for position in (row, column):
                angles = [position / 10_000 ** (i / (dim / 4)) for i in range(dim // 4)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert table[0, 2 + row * grid + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_fixed_position_embedding_is_in_place_and_not_trained() -> None:
    vit = small_vit(image_size=40)
    assert vit.pos_embed.requires_grad
    fix_position_embedding(vit)
    torch.testing.assert_close(vit.pos_embed.data, sincos_position_embedding(192, 5, prefix_tokens=1))
    vit(torch.randn(1, 3, 40, 40)).sum().backward()
    assert vit.pos_embed.grad is None
    assert vit.cls_token.grad is not None


def test_resized_input_interpolates_the_positions_and_keeps_the_class_token() -> None:
    torch.manual_seed(0)
    vit = small_vit()
    before = vit.pos_embed.data.clone()
    resize_input(vit, 48)
    grid = before[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(vit.pos_embed.data, torch.cat([before[:, :1], larger], dim=1))
    assert vit.forward_features(torch.randn(1, 3, 48, 48)).shape == (1, 37, 192)


def test_resized_input_of_a_resnet_changes_nothing() -> None:
    encoder = resolve_encoder("resnet18", image_size=64).build().eval()
    images = torch.randn(1, 3, 48, 48)
    expected = encoder(images)
    resize_input(encoder, 48)
    assert torch.equal(encoder(images), expected)


def test_resized_input_must_hold_whole_patches() -> None:
    vit = small_vit()
    with pytest.raises(RecipeError, match="img_size=50 is not divisible by patch_size=8: the nearest valid is 48"):
        resize_input(vit, 50)
    assert vit(torch.randn(1, 3, 32, 32)).shape == (1, 192)


@pytest.mark.parametrize(("image_size", "patch_size"), [(32, 4), (40, 4), (48, 8), (112, 8), (128, 16), (224, 16)])
def test_default_patch_sizes(image_size: int, patch_size: int) -> None:
    assert resolve_patch_size(image_size, None) == patch_size
    assert resolve_encoder("vit_tiny", image_size=image_size).args["patch_size"] == patch_size


@pytest.mark.parametrize(
    ("image_size", "patch_size", "nearest"),
    [(60, 16, 64), (60, None, 64), (33, 4, 32), (8, 16, 16), (225, None, 224)],
)
def test_image_that_the_patch_does_not_divide(image_size: int, patch_size: int | None, nearest: int) -> None:
    message = rf"^image_size={image_size} is not divisible by patch_size=\d+: the nearest valid is {nearest}$"
    with pytest.raises(RecipeError, match=message):
        resolve_encoder("vit_tiny", image_size=image_size, patch_size=patch_size)
    resolve_encoder("vit_tiny", image_size=nearest, patch_size=patch_size)


@pytest.mark.parametrize(("name", "hint"), [("resnet-50", "resnet50"), ("vit_smal", "vit_small"), ("swin", None)])
def test_unknown_encoder_gets_the_nearest_name(name: str, hint: str | None) -> None:
    nearest = f"did you mean {hint!r}[?] " if hint else ""
    with pytest.raises(RecipeError, match=f"^encoder={name!r} is unknown: {nearest}expected one of resnet18, "):
        resolve_encoder(name, image_size=64)


def test_unknown_stem() -> None:
    with pytest.raises(RecipeError, match=r"^stem='5x5' is unknown: expected auto, 7x7, 3x3, 3x3-nopool$"):
        resolve_encoder("resnet18", image_size=64, stem="5x5")


def test_short_names_are_all_there() -> None:
    assert set(ENCODERS) == set(RESNETS) | set(VITS) == set(WIDTHS)


@pytest.mark.parametrize(
    ("name", "image_size", "layout"),
    [
        ("resnet18", 224, "stem 7x7"),
        ("resnet34", 64, "stem 3x3"),
        ("resnet50", 32, "stem 3x3-nopool"),
        ("vit_base", 64, "patches of 8 px"),
    ],
)
def test_layout_says_what_the_name_leaves_open(name: str, image_size: int, layout: str) -> None:
    assert resolve_encoder(name, image_size=image_size).layout == layout
