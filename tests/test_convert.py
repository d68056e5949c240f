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
from vision_ssl.encoders import ENCODERS, RESNETS, resolve_encoder
from vision_ssl.errors import RecipeError, VisionSSLError, WeightsError
from vision_ssl.extra.convert import Conversion, convert
from vision_ssl.extra.infer import infer_resnet, infer_vit
from vision_ssl.extra.pickles import flatten, read_checkpoint
from vision_ssl.mae import random_mask
from vision_ssl.recipes import MAE, SimCLR, recipe_from_dict
from vision_ssl.restore import reconstruct

State = dict[str, Tensor]
GRID, PATCH, WIDTH, HEADS = 4, 8, 192, 3  # a ViT-Tiny for images of 32 px
DECODER_WIDTH, DECODER_HEADS = 64, 2
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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
        vit = randomised(
            torchvision.models.VisionTransformer(32, PATCH, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
        )

        def tokens(images: Tensor) -> Tensor:
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
    print("eps", difference(encoder.forward_features(IMAGES), original))
    assert 1e-7 < difference(encoder.forward_features(IMAGES), original) < 1e-3


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
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class SmallResNet(nn.Module):
    """ResNet-18 for small images, with activations that have no place among the children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for layer, (width_in, width) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
            blocks = SmallBlock(width_in, width, 1 if layer == 1 else 2), SmallBlock(width, width, 1)
            setattr(self, f"layer{layer}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x.mean(dim=(2, 3))


def small_stem(resnet: nn.Module, *, max_pool: bool, padding: int = 1) -> nn.Module:
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
    print(case, difference(encoder(images), features))
    assert difference(encoder(images), features) < 1e-6
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
        assert difference(model.encoder(images), features) < 1e-6
        assert difference(model.head(features), head(features)) < 1e-6
