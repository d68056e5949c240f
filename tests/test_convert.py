import argparse
import json
import math
import os
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]  # it ships no types
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vision_ssl
from vision_ssl import cli, hub
from vision_ssl.data import photographs
from vision_ssl.encoders import ENCODERS, RESNETS, resolve_encoder
from vision_ssl.errors import CheckpointError, VisionSSLError, WeightsError
from vision_ssl.extra.convert import Conversion, convert
from vision_ssl.extra.infer import infer_resnet, infer_vit
from vision_ssl.extra.layouts import ENCODERS as ENCODER_LAYOUTS
from vision_ssl.extra.layouts import Layout
from vision_ssl.extra.pickles import flatten, read_checkpoint
from vision_ssl.locate import file_hash
from vision_ssl.mae import random_mask
from vision_ssl.recipes import MAE, SimCLR, recipe_from_dict
from vision_ssl.restore import reconstruct

State = dict[str, Tensor]
GRID, PATCH, WIDTH, HEADS = 4, 8, 192, 3  # a ViT-Tiny for images of 32 px
DECODER_WIDTH, DECODER_HEADS = 64, 2
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module) -> nn.Module:
    """In eval mode, with no tensor at its initial value, and all of them such that float16 holds them exactly."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        noise = torch.rand(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.add_(noise - 0.5)
        elif tensor.is_floating_point() and (tensor.ndim == 1 or "token" in name or "pos" in name):
            tensor.add_(0.2 * (noise - 0.5))
        tensor.copy_(tensor.half())
    return module.eval()


def state_of(module: nn.Module, prefix: str = "") -> State:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def resnet(depth: int = 18) -> nn.Module:
    """Of torchvision, without its classifier."""
    model = getattr(torchvision.models, f"resnet{depth}")()
    model.fc = nn.Identity()
    return randomised(model)


def converted(checkpoint: dict[str, Any], folder: Path, **options: Any) -> tuple[Conversion, hub.Encoder]:
    torch.save(checkpoint, folder / "file.pth")
    result = convert(folder / "file.pth", folder / "weights", **options)
    (folder / "file.pth").unlink()  # pytest keeps the folders of three sessions
    return result, vision_ssl.load(folder / "weights")


@torch.no_grad()
def difference(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference, relative to the largest value."""
    return ((first - second).abs().max() / second.abs().max()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Transformers, from their published names


def columns_first(width: int) -> Tensor:
    """The fixed table of MAE's own code, (1, 1 + N, width): a column's sines and cosines, then the row's."""
    table = torch.zeros(1 + GRID**2, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(GRID):
        for column in range(GRID):
            for k in range(quarter):
                token, frequency = table[1 + GRID * row + column], 10_000 ** (-k / quarter)
                for start, position in ((0, column), (2 * quarter, row)):
                    token[start + k] = math.sin(position * frequency)
                    token[start + quarter + k] = math.cos(position * frequency)
    return table.float()[None]


def mae_state(*, decoder: bool) -> State:
    """A state dict of facebookresearch/mae, by its published names and shapes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half().float()

    def linear(name: str, outputs: int, inputs: int) -> State:
        weight = (normal(outputs, inputs) / inputs**0.5).half().float()
        return {f"{name}.weight": weight, f"{name}.bias": normal(outputs)}

    def norm(name: str, width: int) -> State:
        return {f"{name}.weight": normal(width), f"{name}.bias": normal(width)}

    def block(name: str, width: int) -> State:
        return {
            **norm(f"{name}.norm1", width),
            **linear(f"{name}.attn.qkv", 3 * width, width),
            **linear(f"{name}.attn.proj", width, width),
            **norm(f"{name}.norm2", width),
            **linear(f"{name}.mlp.fc1", 4 * width, width),
            **linear(f"{name}.mlp.fc2", width, 4 * width),
        }

    state = {"cls_token": normal(1, 1, WIDTH), "pos_embed": columns_first(WIDTH).half().float()}
    state |= {"patch_embed.proj.weight": normal(WIDTH, 3, PATCH, PATCH) / 16, "patch_embed.proj.bias": normal(WIDTH)}
    for index in range(12):
        state |= block(f"blocks.{index}", WIDTH)
    state |= norm("norm", WIDTH)
    if decoder:
        state |= {"mask_token": normal(1, 1, DECODER_WIDTH), "decoder_pos_embed": columns_first(DECODER_WIDTH)}
        state |= linear("decoder_embed", DECODER_WIDTH, WIDTH)
        for index in range(2):
            state |= block(f"decoder_blocks.{index}", DECODER_WIDTH)
        state |= norm("decoder_norm", DECODER_WIDTH) | linear("decoder_pred", PATCH * PATCH * 3, DECODER_WIDTH)
    return state


def transformer(x: Tensor, state: State, blocks: str, norm: str, heads: int) -> Tensor:
    """Pre-norm blocks and a final norm, tokens (B, T, D) to (B, T, D); the epsilon of MAE's own code."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    index = 0
    while f"{blocks}.{index}.norm1.weight" in state:
        block = f"{blocks}.{index}"
        query, key, value = (
            part.unflatten(2, (heads, -1)).transpose(1, 2)
            for part in linear(layer_norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=2)
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((weights @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(layer_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        index += 1
    return layer_norm(x, norm)


def mae_tokens(images: Tensor, state: State, keep: Tensor | None = None) -> Tensor:
    """Tokens of MAE's encoder (B, 1 + N, D), of the patches `keep` (B, N_keep) alone if they are given."""
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = patches.flatten(2).mT + state["pos_embed"][:, 1:]
    if keep is not None:
        x = torch.stack([tokens[places] for tokens, places in zip(x, keep, strict=True)])
    first = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(images), -1, -1)
    return transformer(torch.cat([first, x], dim=1), state, "blocks", "norm", HEADS)


def mae_pixels(tokens: Tensor, keep: Tensor, state: State) -> Tensor:
    """What MAE's decoder predicts (B, N, p * p * 3) from the kept tokens."""
    x = F.linear(tokens, state["decoder_embed.weight"], state["decoder_embed.bias"])
    patches = state["mask_token"].repeat(len(x), GRID**2, 1)
    for image in range(len(x)):
        for place, token in zip(keep[image], x[image, 1:], strict=True):
            patches[image, place] = token
    x = torch.cat([x[:, :1], patches], dim=1) + state["decoder_pos_embed"]
    x = transformer(x, state, "decoder_blocks", "decoder_norm", DECODER_HEADS)[:, 1:]
    return F.linear(x, state["decoder_pred.weight"], state["decoder_pred.bias"])


def transformers_mae(**settings: Any) -> Any:
    """A ViTMAEForPreTraining; at random, its fixed tables are zeros, which no published weights have."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=32,
        patch_size=PATCH,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=4 * DECODER_WIDTH,
        **settings,
    )
    model = randomised(ViTMAEForPreTraining(config))
    state = model.state_dict()
    state["vit.embeddings.position_embeddings"].copy_(columns_first(WIDTH).half())
    state["decoder.decoder_pos_embed"].copy_(columns_first(DECODER_WIDTH))
    return model


def published_transformers_name(name: str) -> str:
    """The name in the files of facebook/vit-mae-base, which transformers 5 has changed in memory."""
    for new, old in [
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ]:
        name = name.replace(new, old)
    return name


def vit_cases() -> dict[str, Callable[[], tuple[dict[str, Any], Callable[[Tensor], Tensor], str]]]:
    """For each layout: a checkpoint, what gives the original's tokens, and what should be recognised."""

    def timm_vit(**settings: Any) -> Any:
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=PATCH, num_classes=5, **settings)
        return randomised(vit)

    def of_timm() -> Any:
        vit = timm_vit()
        return state_of(vit), vit.forward_features, "timm's ViT"

    def of_timm_without_class_position() -> Any:
        vit = timm_vit(no_embed_class=True)
        assert vit.pos_embed.shape[1] == GRID**2
        return {"state_dict": state_of(vit), "args": argparse.Namespace(model="vit")}, vit.forward_features, "timm's"

    def of_lightly() -> Any:
        vit = timm_vit()
        state = state_of(vit, "backbone.vit.") | {"backbone.mask_token": torch.zeros(1, 1, WIDTH)}
        return {"state_dict": state}, vit.forward_features, "timm's ViT, below 'state_dict.backbone.vit.'"

    def of_torchvision() -> Any:
        vit = torchvision.models.VisionTransformer(32, PATCH, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
        randomised(vit)

        def tokens(images: Tensor) -> Any:
            patches = vit._process_input(images)
            return vit.encoder(torch.cat([vit.class_token.expand(len(images), -1, -1), patches], dim=1))

        return state_of(vit), tokens, "torchvision's ViT"

    def of_facebook() -> Any:
        state = mae_state(decoder=False)
        return {"model": state}, lambda images: mae_tokens(images, state), "facebookresearch/mae, below 'model.'"

    def of_facebook_with_decoder() -> Any:
        state = mae_state(decoder=True)
        checkpoint = {"model": state, "epoch": 3, "args": argparse.Namespace(norm_pix_loss=True)}
        return checkpoint, lambda images: mae_tokens(images, state), "facebookresearch/mae, below 'model.'"

    def of_transformers(rename: Callable[[str], str]) -> Any:
        model = transformers_mae(mask_ratio=0.0, layer_norm_eps=1e-6)
        order = torch.arange(float(GRID**2)).expand(len(IMAGES), -1)  # otherwise the tokens come shuffled
        return (
            {rename(name): tensor for name, tensor in model.state_dict().items()},
            lambda images: model.vit(images, noise=order).last_hidden_state,
            "transformers' ViT or ViTMAE, below 'vit.'",
        )

    return {
        "timm": of_timm,
        "timm without a position of the class token": of_timm_without_class_position,
        "lightly": of_lightly,
        "torchvision": of_torchvision,
        "facebookresearch/mae": of_facebook,
        "facebookresearch/mae with decoder": of_facebook_with_decoder,
        "transformers 4": lambda: of_transformers(published_transformers_name),
        "transformers 5": lambda: of_transformers(str),
    }


@pytest.mark.parametrize("case", vit_cases())
@torch.no_grad()
def test_tokens_of_a_vit_equal_the_original(tmp_path: Path, case: str) -> None:
    checkpoint, original, recognised = vit_cases()[case]()
    result, encoder = converted(checkpoint, tmp_path)
    assert result.recognised.startswith(recognised)
    assert result.encoder == "vit_tiny, patches of 8 px, at 32 px"
    tokens = original(IMAGES)
    assert difference(encoder.forward_features(IMAGES), tokens) < 1e-6
    torch.testing.assert_close(encoder(IMAGES), tokens[:, 1:].mean(dim=1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_epsilon_of_transformers_is_said_and_measured(tmp_path: Path) -> None:
    model = transformers_mae(mask_ratio=0.0)
    order = torch.arange(float(GRID**2)).expand(len(IMAGES), -1)
    result, encoder = converted(model.state_dict(), tmp_path)
    assert "LayerNorm adds 1e-06 to the variance here, and 1e-12 in the original" in result.notes
    original = model.vit(IMAGES, noise=order).last_hidden_state
    assert 1e-6 < difference(encoder.forward_features(IMAGES), original) < 2e-5


# ---------------------------------------------------------------------------------------------------------------------
# ResNets


class SmallBlock(nn.Module):
    """A basic block as lightly and others write it for small images, where the shortcut has a name of its own."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)
        return y.relu()


class SmallResNet(nn.Module):
    """ResNet-18 for small images, with activations that have no place among the children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(SmallBlock(64, 64, 1), SmallBlock(64, 64, 1))
        self.layer2 = nn.Sequential(SmallBlock(64, 128, 2), SmallBlock(128, 128, 1))
        self.layer3 = nn.Sequential(SmallBlock(128, 256, 2), SmallBlock(256, 256, 1))
        self.layer4 = nn.Sequential(SmallBlock(256, 512, 2), SmallBlock(512, 512, 1))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.bn1(self.conv1(x)).relu())
        return self.layer4(self.layer3(self.layer2(x))).mean(dim=(2, 3))  # type: ignore[no-any-return]  # a Tensor


def small_stem(resnet: Any, *, max_pool: bool, padding: int = 1) -> Any:
    """Replace the stem of a torchvision ResNet."""
    resnet.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
    if not max_pool:
        resnet.maxpool = nn.Identity()
    return randomised(resnet)


def projector(width: int, *, norm: bool) -> nn.Module:
    """SimCLR's, with or without BatchNorm."""
    if norm:
        layers = [nn.Linear(width, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 32, bias=False)]
        return randomised(nn.Sequential(*layers, nn.BatchNorm1d(32)))
    return randomised(nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, 32)))


def resnet_cases() -> dict[str, Callable[[], tuple[Any, ...]]]:
    """For each layout: a checkpoint, the original encoder, its projector, and what should be recognised."""

    def of_timm() -> Any:
        model = randomised(timm.create_model("resnet18", num_classes=0))
        return state_of(model), model, None, "timm's or torchvision's ResNet", "resnet18, stem 7x7, at 224 px"

    def of_torchvision() -> Any:
        model = resnet(34)
        state = state_of(model) | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
        for name in [name for name in state if name.endswith("num_batches_tracked")]:
            del state[name]  # as in torchvision's first files
        return state, model, None, "timm's or torchvision's ResNet", "resnet34, stem 7x7, at 224 px"

    def of_vissl() -> Any:
        model, head = resnet(50), projector(2048, norm=False)
        clf = {"0.weight": "0.clf.0.weight", "0.bias": "0.clf.0.bias", "2.weight": "1.clf.0.weight"}
        names = clf | {"2.bias": "1.clf.0.bias"}
        trunk = state_of(model, "_feature_blocks.")
        base = {"trunk": trunk, "heads": {names[name]: tensor for name, tensor in head.state_dict().items()}}
        checkpoint = {"iteration": 5, "classy_state_dict": {"base_model": {"model": base, "meta": {}}}}
        prefix = "classy_state_dict.base_model.model.trunk."
        return checkpoint, model, head, f"VISSL's ResNet, below '{prefix}'", "resnet50, stem 7x7, at 224 px"

    def of_sthalles() -> Any:
        model, head = resnet(), projector(512, norm=False)
        state = state_of(model, "backbone.") | state_of(head, "backbone.fc.")
        checkpoint = {"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}
        recognised = "timm's or torchvision's ResNet, below 'state_dict.backbone.'"
        return checkpoint, model, head, recognised, "resnet18, stem 7x7, at 224 px"

    def of_study_a() -> Any:
        model = resnet()
        sequence = nn.Sequential(*list(model.children())[:-1])
        assert {"0.weight", "4.0.conv1.weight"} <= sequence.state_dict().keys()
        recognised = "the children of a torchvision ResNet in nn.Sequential"
        return sequence.state_dict(), model, None, recognised, "resnet18, stem 7x7, at 224 px"

    def of_lightly() -> Any:
        model, head = resnet(), projector(512, norm=True)
        sequence = nn.Sequential(*list(model.children())[:-1])
        state = state_of(sequence, "backbone.") | state_of(head, "projection_head.layers.")
        checkpoint = {"pytorch-lightning_version": "2.5.0", "state_dict": state, "hyper_parameters": {"lr": 0.06}}
        recognised = "the children of a torchvision ResNet in nn.Sequential, below 'state_dict.backbone.'"
        return checkpoint, model, head, recognised, "resnet18, stem 7x7, at 224 px"

    def of_small_lightly() -> Any:
        model, head = randomised(SmallResNet()), projector(512, norm=True)
        sequence = nn.Sequential(*list(model.children())[:-1])
        state = state_of(sequence, "backbone.") | state_of(head, "projection_head.layers.")
        recognised = "the children of lightly's ResNet for small images in nn.Sequential, below 'backbone.'"
        return state, model, head, recognised, "resnet18, stem 3x3-nopool, at 32 px"

    def of_small_unwrapped() -> Any:
        model = randomised(SmallResNet())
        recognised = "a ResNet for small images as lightly's, below 'net.'"
        return {"net": state_of(model, "module.")}, model, None, recognised, "resnet18, stem 3x3-nopool, at 32 px"

    def of_solo_learn() -> Any:
        model, head = resnet(), projector(512, norm=False)
        state = state_of(model, "backbone.") | state_of(model, "momentum_backbone.") | state_of(head, "projector.")
        state |= {"classifier.weight": torch.zeros(10, 512), "classifier.bias": torch.zeros(10)}
        recognised = "timm's or torchvision's ResNet, below 'state_dict.backbone.'"
        return {"state_dict": state, "callbacks": {}}, model, head, recognised, "resnet18, stem 7x7, at 224 px"

    return {
        "timm": of_timm,
        "torchvision": of_torchvision,
        "VISSL": of_vissl,
        "sthalles/SimCLR": of_sthalles,
        "nn.Sequential": of_study_a,
        "lightly": of_lightly,
        "lightly, small images": of_small_lightly,
        "small images": of_small_unwrapped,
        "solo-learn": of_solo_learn,
    }


@pytest.mark.parametrize("case", resnet_cases())
@torch.no_grad()
def test_features_of_a_resnet_equal_the_original(tmp_path: Path, case: str) -> None:
    checkpoint, original, head, recognised, described = resnet_cases()[case]()
    result, encoder = converted(checkpoint, tmp_path)
    assert (result.recognised, result.encoder) == (recognised, described)
    images = F.interpolate(IMAGES, 64)
    features = original(images)
    assert torch.equal(encoder(images), features)
    assert (tmp_path / "weights" / "head.safetensors").exists() == (head is not None)
    if head is not None:
        recipe = SimCLR(
            encoder=result.encoder.split(",")[0],
            stem="3x3-nopool" if "3x3" in described else "7x7",
            projector_hidden=96,
            projector_dim=32,
            projector_norm=len(list(head)) == 5,
        )
        model: Any = recipe.build().eval()
        hub.load_into(model, tmp_path / "weights", head_required=True)  # as `train --init` does
        assert torch.equal(model.encoder(images), features)
        assert torch.equal(model.head(features), head(features))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(512, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 32)],
        [nn.Linear(512, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 32)],
        [nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 32)],
        [nn.Linear(512, 32)],
    ],
    ids=["BYOL's", "three layers", "width", "one layer"],
)
def test_a_projector_of_another_kind_is_left_out(tmp_path: Path, layers: list[nn.Module]) -> None:
    head = nn.Sequential(*layers).state_dict()
    state = {f"backbone.{name}": tensor for name, tensor in small_file(meta_state("resnet18")).items()}
    result, _ = converted(state | {f"projector.{name}": tensor for name, tensor in head.items()}, tmp_path)
    assert result.head == ""
    assert result.left_out == (f"projector ({len(head)} tensors)",)
    assert not (tmp_path / "weights" / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "described"),
    [
        ({}, "stem 3x3-nopool, at 32 px"),
        ({"image_size": 40}, "stem 3x3-nopool, at 40 px"),
        ({"image_size": 41}, "stem 3x3, at 41 px"),
        ({"stem": "3x3"}, "stem 3x3, at 64 px"),
        ({"stem": "3x3-nopool", "image_size": 64}, "stem 3x3-nopool, at 64 px"),
    ],
)
def test_what_follows_a_small_stem_is_decided_by_a_rule(options: dict[str, Any], described: str) -> None:
    spec = infer_resnet(meta_state("resnet18", "3x3"), stem=options.get("stem"), image_size=options.get("image_size"))
    assert f"{spec.layout}, at {spec.image_size} px" == described


@pytest.mark.parametrize("max_pool", [False, True])
@torch.no_grad()
def test_the_small_stem_that_is_asked_for(tmp_path: Path, max_pool: bool) -> None:
    original = small_stem(resnet(), max_pool=max_pool)
    options = {"stem": "3x3"} if max_pool else {}
    result, encoder = converted(state_of(original), tmp_path, **options)
    assert torch.equal(encoder(IMAGES), original(IMAGES))
    said = "whether a max-pool follows the 3x3 stem is not in the weights: assumed stem 3x3-nopool (--stem)"
    assert (said in result.notes) == (not max_pool)


def test_a_layout_without_a_max_pool_never_has_one(tmp_path: Path) -> None:
    with torch.device("meta"):
        original = SmallResNet()
    result, _ = converted(small_file(original.state_dict()), tmp_path, image_size=64)
    assert result.encoder == "resnet18, stem 3x3-nopool, at 64 px"
    assert result.left_out == ("linear (2 tensors)",)
    assert result.notes == ()


@torch.no_grad()
def test_the_wider_padding_of_solo_learn_is_said(tmp_path: Path) -> None:
    original = small_stem(resnet(), max_pool=False, padding=2)
    state = state_of(original, "backbone.") | state_of(projector(512, norm=False), "projector.")
    result, encoder = converted({"state_dict": state}, tmp_path)
    assert sum("solo-learn pads its 3x3 stem by 2 pixels" in note for note in result.notes) == 1
    assert difference(encoder(IMAGES), original(IMAGES)) > 1e-2  # so it has to be said
    original.conv1.padding = (1, 1)
    assert torch.equal(encoder(IMAGES), original(IMAGES))


def meta_state(name: str, stem: str = "7x7") -> State:
    """Tensors with shapes and no content."""
    with torch.device("meta"):
        return resolve_encoder(name, image_size=96, stem=stem, patch_size=16, channels=5).build().state_dict()


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_known_by_its_shapes(name: str) -> None:
    state = meta_state(name)
    spec = infer_resnet(state, stem=None, image_size=96) if name in RESNETS else infer_vit(state)
    assert spec == resolve_encoder(name, image_size=96, stem="7x7", patch_size=16, channels=5)


# ---------------------------------------------------------------------------------------------------------------------
# MAE's decoder


@torch.no_grad()
def assert_same_predictions(weights: Path, expected: Tensor, keep: Tensor, mask: Tensor, tolerance: float) -> None:
    model: Any = recipe_from_dict(hub.read_card(weights)["recipe"]).build().eval()
    hub.load_into(model, weights, head_required=True)
    assert difference(model.predict(IMAGES, keep, mask), expected) < tolerance


@pytest.mark.parametrize("rows_first", [False, True])
@torch.no_grad()
def test_predictions_equal_those_of_facebookresearch_mae(tmp_path: Path, rows_first: bool) -> None:
    state = mae_state(decoder=True)
    if rows_first:  # as this package, and whoever has exchanged the two
        state["decoder_pos_embed"] = columns_first(DECODER_WIDTH).roll(DECODER_WIDTH // 2, dims=-1)
    options = argparse.Namespace(norm_pix_loss=False, decoder_num_attention_heads=DECODER_HEADS)
    result, encoder = converted({"model": state, "args": options}, tmp_path)
    assert result.head == "MAE's decoder, 64 wide, 2 blocks of 2 heads"
    assert result.left_out == ()
    assert encoder.card["method"] == "mae"
    assert encoder.card["recipe"]["norm_pix"] is False
    keep, mask = random_mask(torch.rand(len(IMAGES), GRID**2, generator=torch.Generator().manual_seed(1)), 0.75)
    expected = mae_pixels(mae_tokens(IMAGES, state, keep), keep, state)
    assert_same_predictions(tmp_path / "weights", expected, keep, mask, 1e-6)


@torch.no_grad()
def test_predictions_equal_those_of_lightly(tmp_path: Path) -> None:
    state = mae_state(decoder=True)
    names = {name: "decoder." if name.startswith(("decoder_", "mask_token")) else "backbone.vit." for name in state}
    renamed = {f"{prefix}{name}": state[name] for name, prefix in names.items()}
    result, _ = converted({"state_dict": renamed | {"backbone.mask_token": torch.zeros(1, 1, WIDTH)}}, tmp_path)
    assert result.recognised == "timm's ViT, below 'state_dict.backbone.vit.'"
    assert result.left_out == ("state_dict.backbone.mask_token (1 tensor)",)
    keep, mask = random_mask(torch.rand(len(IMAGES), GRID**2, generator=torch.Generator().manual_seed(1)), 0.75)
    expected = mae_pixels(mae_tokens(IMAGES, state, keep), keep, state)
    assert_same_predictions(tmp_path / "weights", expected, keep, mask, 1e-6)


@pytest.mark.parametrize("rename", [str, published_transformers_name], ids=["transformers 5", "transformers 4"])
@torch.no_grad()
def test_predictions_equal_those_of_transformers(tmp_path: Path, rename: Callable[[str], str]) -> None:
    model = transformers_mae(layer_norm_eps=1e-6)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    result, _ = converted({rename(name): tensor for name, tensor in model.state_dict().items()}, tmp_path)
    assert result.notes == ("pooled features are the mean of the normed patch tokens, whatever the original pools",)
    noise = torch.rand(len(IMAGES), GRID**2, generator=torch.Generator().manual_seed(1))
    keep, mask = random_mask(noise, 0.75)
    assert_same_predictions(tmp_path / "weights", model(IMAGES, noise=noise).logits, keep, mask, 3e-5)


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    transformers_mae(layer_norm_eps=1e-6).save_pretrained(tmp_path / "original")
    result = convert(tmp_path / "original" / "model.safetensors", tmp_path / "weights")
    assert result.head == "MAE's decoder, 64 wide, 2 blocks of 2 heads"
    assert result.left_out == ()


def test_what_is_not_told_about_a_decoder_is_said(tmp_path: Path) -> None:
    result, _ = converted({"model": mae_state(decoder=True)}, tmp_path)
    assert "of the decoder, the file does not tell its 2 attention heads and that it predicts" in result.notes[-1]


@pytest.mark.parametrize("change", ["position", "depth", "pixels"])
def test_a_decoder_of_another_kind_is_left_out(tmp_path: Path, change: str) -> None:
    state = mae_state(decoder=True)
    if change == "position":
        state["decoder_pos_embed"][0, 3, 5] += 0.1
    elif change == "depth":
        del state["decoder_blocks.0.mlp.fc1.bias"]
    else:
        state["decoder_pred.weight"] = torch.zeros(64, DECODER_WIDTH)
    result, encoder = converted({"model": state}, tmp_path)
    assert result.head == ""
    assert "model.decoder_embed (2 tensors)" in result.left_out
    assert "recipe" not in encoder.card
    assert not (tmp_path / "weights" / "head.safetensors").exists()


def test_imported_mae_reconstructs(tmp_path: Path) -> None:
    converted({"model": mae_state(decoder=True)}, tmp_path)
    original, masked, predicted = reconstruct(tmp_path / "weights", list(photographs().values()))
    assert original.shape == masked.shape == predicted.shape == (3, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Names: wrappers, several networks, what is unknown or missing


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.backbone.",
        "backbone.module.",
        "encoder.",
        "encoder.backbone._orig_mod.module.encoder.",
    ],
)
@pytest.mark.parametrize("layout", ENCODER_LAYOUTS, ids=lambda layout: layout.label)
def test_wrappers_in_any_nesting(layout: Layout, prefix: str) -> None:
    tensors = flatten({f"{prefix}{layout.anchor}": torch.zeros(1)})
    plain = prefix.replace("module.", "").replace("_orig_mod.", "")
    assert layout.prefixes(tensors) == [plain]
    bare = layout.find({layout.anchor: torch.zeros(1)}, "")
    assert layout.find(tensors, plain).tensors.keys() == bare.tensors.keys()


def small_file(state: State, value: float = 1.0) -> State:
    """The same names and shapes in a file of no size: each tensor is one number, seen many times."""
    return {name: torch.tensor(value).expand(tensor.shape) for name, tensor in state.items()}


@pytest.fixture
def vit_state() -> State:
    """Of timm's ViT-Tiny."""
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=PATCH, num_classes=0)
    return small_file(vit.state_dict())


def test_a_moving_average_is_left_out_and_said(tmp_path: Path, vit_state: State) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in vit_state.items()}
    checkpoint = {
        "state_dict": vit_state,
        "state_dict_ema": zeros,
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    }
    result, encoder = converted(checkpoint, tmp_path)
    assert result.left_out == ("optimizer (1 tensor)", f"state_dict_ema ({len(zeros)} tensors)")
    assert encoder.card["left_out"] == list(result.left_out)
    assert encoder.state_dict()["cls_token"].any() == vit_state["cls_token"].any()
    assert encoder.state_dict()["norm.weight"].any()


def test_a_moving_average_that_stands_alone_is_taken(tmp_path: Path, vit_state: State) -> None:
    result, _ = converted({"teacher": {f"backbone.{name}": tensor for name, tensor in vit_state.items()}}, tmp_path)
    assert result.recognised == "timm's ViT, below 'teacher.backbone.'"


def test_classifiers_and_strangers_beside_the_encoder_are_said(tmp_path: Path, vit_state: State) -> None:
    state = state_of_names(vit_state, "model.") | {
        "model.head.weight": torch.zeros(5, WIDTH),
        "model.head.bias": torch.zeros(5),
        "online_classifier.linear.weight": torch.zeros(5, WIDTH),
        "criterion.center": torch.zeros(1, 5),
    }
    result, _ = converted({"state_dict": state}, tmp_path)
    assert result.left_out == (
        "state_dict.criterion (1 tensor)",
        "state_dict.model.head (2 tensors)",
        "state_dict.online_classifier (1 tensor)",
    )


def state_of_names(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def refused(checkpoint: Any, folder: Path, **options: Any) -> str:
    """The single line by which a checkpoint is refused; nothing is written."""
    torch.save(checkpoint, folder / "file.pth")
    with pytest.raises(VisionSSLError) as refusal:
        convert(folder / "file.pth", folder / "weights", **options)
    assert not (folder / "weights").exists()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    return str(refusal.value)


# What becomes of a ViT-Tiny's state dict, and how it is refused.
SPOILED: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda s: s.pop("blocks.3.attn.proj.bias"), "'blocks.3.attn.proj.bias' is missing, expected (192,)"),
    "final norm": (
        lambda s: s.update({"fc_norm.weight": s.pop("norm.weight"), "fc_norm.bias": s.pop("norm.bias")}),
        "'norm.weight' is missing, expected (192,), 'norm.bias' is missing, expected (192,), "
        "'fc_norm.weight' is (192,), expected nothing, 'fc_norm.bias' is (192,), expected nothing",
    ),
    "layer scale": (
        lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(192)}),
        "this is no vit_tiny of ours: 'blocks.0.ls1.gamma' is (192,), expected nothing",
    ),
    "registers": (lambda s: s.update(reg_token=torch.ones(1, 4, 192)), "'reg_token' is (1, 4, 192), expected nothing"),
    "shape": (
        lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.ones(700)}),
        "'blocks.0.mlp.fc1.bias' is (700,), expected (768,)",
    ),
    "depth": (lambda s: s.pop("blocks.11.norm1.weight"), "a ViT 192 wide with 11 blocks is none of ours"),
    "width": (
        lambda s: s.update({"patch_embed.proj.weight": torch.ones(1024, 3, 8, 8)}),
        "a ViT 1024 wide with 12 blocks is none of ours: expected vit_tiny of 192 and 12, vit_small of 384 and 12",
    ),
    "no class token": (lambda s: s.pop("cls_token"), "'cls_token' is missing: expected a tensor of 3 dimensions"),
    "no position": (lambda s: s.pop("pos_embed"), "'pos_embed' is missing"),
    "flat position": (lambda s: s.update(pos_embed=torch.ones(17, 192)), "'pos_embed' is of shape (17, 192)"),
    "oblong": (lambda s: s.update(pos_embed=torch.ones(1, 13, 192)), "a ViT of 12 patches of 8 x 8 px"),
    "oblong patches": (
        lambda s: s.update({"patch_embed.proj.weight": torch.ones(192, 3, 8, 4)}),
        "a ViT of 16 patches of 8 x 4 px",
    ),
    "empty": (lambda s: s.update({"patch_embed.proj.weight": torch.ones(192, 3, 0, 0)}), "is of shape (192, 3, 0, 0)"),
    "half a query": (
        lambda s: s.update({"blocks.0.attn.q.weight": torch.ones(192, 192)}),
        "'blocks.0.attn.q.weight' is (192, 192), expected nothing",
    ),
    "nothing": (lambda s: s.clear(), "the file holds no tensors by name"),
    "not finite": (
        lambda s: s.update({"norm.bias": torch.full((192,), math.nan)}),
        "norm.bias has values up to nan, which float16",
    ),
    "two encoders": (
        lambda s: s.update({f"other.{name}": tensor for name, tensor in s.items()}),
        "it holds several encoders, below '', 'other.': expected a file with one",
    ),
    "wrapped and not": (
        lambda s: s.update({"module.cls_token": s["cls_token"]}),
        "'module.cls_token' is there with and without its wrapper",
    ),
    "sparse": (lambda s: s.update(cls_token=s["cls_token"].to_sparse()), "'cls_token' is a torch.sparse.FloatTensor"),
    "complex": (lambda s: s.update(cls_token=s["cls_token"] + 1j), "'cls_token' is a torch.ComplexFloatTensor"),
    "unheard of": (
        lambda s: s.pop("patch_embed.proj.weight"),
        "no encoder was recognised among cls_token, pos_embed, patch_embed.proj.bias, blocks.0.norm1.weight, "
        "blocks.0.norm1.bias and 144 more: expected VISSL's ResNet",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_no_vit_of_ours_is_refused(tmp_path: Path, vit_state: State, what: str) -> None:
    spoil, message = SPOILED[what]
    spoil(vit_state)
    assert message in refused(vit_state, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer4.2.conv1.weight": (1,)}, "a ResNet of 2-2-2-3 basic blocks is none of ours: expected resnet18, "),
        ({"layer1.0.conv3.weight": (1,)}, "a ResNet of 2-2-2-2 bottleneck blocks is none of ours"),
        ({"conv1.weight": (64, 3, 5, 5)}, "'conv1.weight' is (64, 3, 5, 5): expected a kernel of 7 x 7 or 3 x 3"),
        ({"conv1.weight": (64, 3)}, "'conv1.weight' is of shape (64, 3): expected a tensor of 4 dimensions"),
        (
            {"conv1.weight": (32, 3, 7, 7)},
            "this is no resnet18 of ours: 'conv1.weight' is (32, 3, 7, 7), expected (64,",
        ),
        ({"layer1.0.se.fc.weight": (4,)}, "'layer1.0.se.fc.weight' is (4,), expected nothing"),
    ],
    ids=str,
)
def test_what_is_no_resnet_of_ours_is_refused(tmp_path: Path, change: dict[str, tuple[int, ...]], message: str) -> None:
    state = small_file(meta_state("resnet18"))
    state["conv1.weight"] = state["conv1.weight"][:, :3]
    assert message in refused(state | {name: torch.zeros(shape) for name, shape in change.items()}, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "3x3"}, "stem='3x3' does not fit 'conv1.weight' of (64, 5, 7, 7): expected 7x7"),
        ({"stem": "5x5"}, "stem='5x5' is unknown: expected 7x7, 3x3, 3x3-nopool"),
        ({"image_size": 0}, "image_size=0 is too small: expected at least 1"),
    ],
)
def test_options_that_do_not_fit_a_resnet(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    state = small_file(meta_state("resnet18"))
    assert message in refused(state, tmp_path, **options)


def test_a_vit_has_one_image_size(tmp_path: Path, vit_state: State) -> None:
    assert "image_size=64 is not the 32 px of the position embedding" in refused(vit_state, tmp_path, image_size=64)
    assert converted(vit_state, tmp_path, image_size=32)[0].encoder.endswith("at 32 px")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 12}, "its config.json has num_attention_heads 12: expected 3"),
        ({"hidden_act": "quick_gelu"}, "its config.json has hidden_act 'quick_gelu': expected 'gelu'"),
    ],
)
def test_a_config_that_asks_for_something_else(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in refused(transformers_mae().state_dict(), tmp_path)


@pytest.mark.parametrize("config", ["", "[]", "5", '{"pretrained_cfg": 5, "layer_norm_eps": []}'])
def test_a_config_about_something_else_does_no_harm(tmp_path: Path, vit_state: State, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert len(converted(vit_state, tmp_path)[0].notes) == 1


def test_other_statistics_of_the_images_are_said(tmp_path: Path, vit_state: State) -> None:
    half = [0.5, 0.5, 0.5]
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": half, "std": half}}))
    assert converted(vit_state, tmp_path)[0].notes[-1] == (
        "`preprocess` normalises by mean and std [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], but the original by "
        "[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))  # as torch's; of a later one, torch would warn


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle])
@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.bin", "x.pth.tar", "x.pkl", "x", "x.safetensors"])
def test_nothing_in_a_file_runs(tmp_path: Path, name: str, write: Callable[[object, Path], None]) -> None:
    path, canary = tmp_path / name, tmp_path / "canary"
    write({"state_dict": {}, "args": argparse.Namespace(x=Canary(canary))}, path)
    with pytest.raises(WeightsError) as refusal:
        convert(path, tmp_path / "weights")
    assert not canary.exists()
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    if not name.endswith(".safetensors"):
        assert f"holds a pickled {os.mkdir.__module__}.mkdir, which could run code, and is not opened" in str(
            refusal.value
        )
    load = pickle.load if write is write_pickle else lambda file: torch.load(file, weights_only=False)
    with path.open("rb") as file:
        load(file)
    assert canary.exists()  # it sings where it is let


def test_other_classes_are_refused_by_name(tmp_path: Path, vit_state: State) -> None:
    line = refused({"state_dict": vit_state, "hyper_parameters": {"lr": Fraction(1, 3)}}, tmp_path)
    assert "holds a pickled fractions.Fraction, which could run code, and is not opened" in line
    assert "torch.save(model.state_dict(), " in line


def test_a_whole_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    assert "holds a pickled torch.nn.modules.linear.Linear, which" in refused(nn.Linear(1, 1), tmp_path)


def test_allowing_options_lasts_no_longer_than_one_file(tmp_path: Path, vit_state: State) -> None:
    torch.save({"model": vit_state, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth")["args"].lr == 1
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00.", b"no pickle", b"\0" * 99])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as refusal:
        convert(tmp_path / name, tmp_path / "weights")
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [[1], torch.zeros(1), "text"], ids=["list", "tensor", "text"])
def test_files_of_something_else(tmp_path: Path, content: object) -> None:
    assert f"holds a {type(content).__name__}: expected a dictionary of tensors" in refused(content, tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a file: expected a checkpoint"):
        convert(tmp_path / "x.pth", tmp_path / "weights")


def test_a_dictionary_that_holds_itself() -> None:
    checkpoint: dict[str, Any] = {"x": torch.zeros(1), "inside": {"y": torch.ones(1)}}
    checkpoint["inside"]["again"] = checkpoint
    checkpoint["states"] = [{"z": torch.ones(1)}, 5]
    assert list(flatten(checkpoint)) == ["x", "inside.y", "states.0.z"]


def test_a_dictionary_far_below_others() -> None:
    checkpoint: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(5000):
        checkpoint = {"a": checkpoint}
    assert list(flatten(checkpoint)) == ["a." * 5000 + "x"]


def test_safetensors_are_read_too(tmp_path: Path, vit_state: State) -> None:
    save_file({name: tensor.contiguous() for name, tensor in vit_state.items()}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "weights")
    assert load_file(tmp_path / "weights" / "model.safetensors").keys() == vit_state.keys()


def test_other_weights_are_not_overwritten(tmp_path: Path, vit_state: State) -> None:
    (tmp_path / "weights").mkdir()
    converted(vit_state, tmp_path)  # an empty folder is as good as none
    before = (tmp_path / "weights" / "config.json").read_text()
    torch.save(vit_state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="is there already: expected a new or an empty folder"):
        convert(tmp_path / "file.pth", tmp_path / "weights")
    with pytest.raises(CheckpointError, match="is there already"):
        convert(tmp_path / "file.pth", tmp_path / "file.pth")
    assert (tmp_path / "weights" / "config.json").read_text() == before


# ---------------------------------------------------------------------------------------------------------------------
# The card, and the command line


def test_the_card_says_where_it_came_from(tmp_path: Path, vit_state: State) -> None:
    torch.save(vit_state, tmp_path / "mine.pth")
    result = convert(tmp_path / "mine.pth", tmp_path / "weights")
    card = vision_ssl.load(tmp_path / "weights").card
    source = {"file": "mine.pth", "sha256": file_hash(tmp_path / "mine.pth"), "recognised": "timm's ViT"}
    assert card["source"] == source
    assert (card["left_out"], card["notes"], card["scores"]) == ([], list(result.notes), [])
    assert card["licence"] == result.licence == "unknown: see its source"


@pytest.mark.parametrize(
    ("container", "decoder", "table", "published"),
    [
        ("model", False, "columns", True),
        ("model", True, "columns", True),
        ("", True, "columns", True),
        ("state_dict", False, "columns", False),
        ("model", False, "learned", False),
    ],
)
def test_the_licence_of_facebookresearch_mae(
    tmp_path: Path, container: str, decoder: bool, table: str, published: bool
) -> None:
    state = mae_state(decoder=decoder)
    if table == "learned":
        state["pos_embed"] = torch.rand_like(state["pos_embed"])
    result, _ = converted({container: state} if container else state, tmp_path)
    assert result.recognised.startswith("facebookresearch/mae" if published else "timm's ViT")
    expected = "CC-BY-NC-4.0 where facebookresearch/mae published these weights; otherwise unknown: see its source"
    assert result.licence == (expected if published else "unknown: see its source")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, weights = tmp_path / "mae.pth", tmp_path / "weights"
    torch.save({"model": mae_state(decoder=True), "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, file)
    cli.main(["import", str(file), "-o", str(weights)])
    lines = {
        "recognised": "facebookresearch/mae, below 'model.'",
        "encoder": "vit_tiny, patches of 8 px, at 32 px",
        "head": "MAE's decoder, 64 wide, 2 blocks of 2 heads",
        "left out": "optimizer (1 tensor)",
        "note": "pooled features are the mean of the normed patch tokens, whatever the original pools",
        "note ": "of the decoder, the file does not tell its 2 attention heads and that it predicts pixels normalised "
        "within their patch: assumed",
        "licence": "CC-BY-NC-4.0 where facebookresearch/mae published these weights; otherwise unknown: see its source",
        "out": str(weights),
    }
    assert capsys.readouterr().out.splitlines() == [f"{name.strip():>10}  {line}" for name, line in lines.items()]
    cli.main(["info", str(weights)])
    assert json.loads(capsys.readouterr().out) == vision_ssl.load(weights).card
    with pytest.raises(SystemExit, match=r"^error: out='.*' is there already"):
        cli.main(["import", str(file), "-o", str(weights)])


def test_options_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("vision_ssl.extra.convert.convert", lambda *given, **options: asked.append((given, options)))
    cli.main(["import", "a.pth", "--out", "b", "--stem", "3x3-nopool", "--image-size", "48"])
    cli.main(["import", "a.pth", "-o", "b"])
    files = Path("a.pth"), Path("b")
    assert asked[0] == (files, {"stem": "3x3-nopool", "image_size": 48})
    assert asked[1] == (files, {"stem": None, "image_size": None})


def test_training_goes_on_from_imported_weights(tmp_path: Path, photos: Path) -> None:
    converted({"model": mae_state(decoder=True)}, tmp_path)
    recipe = MAE(
        encoder="vit_tiny",
        image_size=32,
        patch_size=PATCH,
        decoder_dim=64,
        decoder_depth=2,
        decoder_heads=2,
        batch_size=24,
        epochs=1,
        base_lr=0.0,
    )
    run = recipe.train(
        photos, init=str(tmp_path / "weights"), out=str(tmp_path / "run"), device="cpu", precision="fp32", look_epochs=0
    )
    for file in ("model.safetensors", "head.safetensors"):
        trained, imported = (load_file(tmp_path / place / file) for place in ("run/weights", "weights"))
        assert all(torch.equal(trained[name], imported[name]) for name in imported)
    assert run.encoder.card["training"]["init"] == str(tmp_path / "weights")
