import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vision_ssl.pretrain
from vision_ssl.augment import Draws
from vision_ssl.errors import RecipeError
from vision_ssl.optim import build_optimizer
from vision_ssl.options import RunOptions
from vision_ssl.presets import PRESETS
from vision_ssl.recipes import MAE, METHODS, Recipe, SimCLR, recipe_from_dict

ALL_PRESETS = [(method, name) for method, presets in PRESETS.items() for name in presets]


def preset(method: str, name: str, **changes: Any) -> Recipe:
    return METHODS[method].preset(name, **changes)


def count(module: Any) -> float:
    """Millions of parameters."""
    return float(sum(p.numel() for p in module.parameters()) / 1e6)


# The five systems of the two studies, row by row


def test_system_1_simclr_resnet18_of_study_a() -> None:
    recipe = SimCLR.preset("study-a")
    assert (recipe.encoder, recipe.stem, recipe.image_size) == ("resnet18", "7x7", 60)
    assert (recipe.optimizer, recipe.weight_decay) == ("lars", 1e-6)
    assert recipe.lr == pytest.approx(1.2)
    assert (recipe.batch_size, recipe.epochs) == (1024, 35)
    assert (recipe.warmup_length, recipe.schedule) == (0, "cosine")
    assert recipe.temperature == 0.5
    assert (recipe.jitter, recipe.jitter_probability) == ((0.4, 0.4, 0.4, 0.1), 1.0)
    assert (recipe.grayscale, recipe.blur, recipe.blur_kernel, recipe.flip) == (0.0, 1.0, 5, 0.5)
    model: Any = build_on_meta(recipe)
    assert recipe.encoder_spec().architecture == "resnet18"
    assert widths(model.head) == [(512, 512), (512, 128)]


def test_system_2_mae_resnet18_of_study_a() -> None:
    recipe = MAE.preset("study-a")
    assert (recipe.encoder, recipe.stem, recipe.image_size) == ("resnet18", "7x7", 60)
    assert (recipe.optimizer, recipe.weight_decay, recipe.betas) == ("adam", 0.0, (0.9, 0.999))
    assert recipe.lr == pytest.approx(7e-3)
    assert (recipe.batch_size, recipe.epochs) == (786, 4)
    assert (recipe.warmup_length, recipe.schedule) == (0, "constant")
    assert (recipe.mask_ratio, recipe.mask_unit, recipe.shared_mask) == (0.75, "pixel", True)
    assert (recipe.loss_on, recipe.norm_pix) == ("all", False)
    assert (recipe.crop_scale, recipe.flip) == ((1.0, 1.0), 0.0)
    model: Any = build_on_meta(recipe)
    transposed = [layer for layer in model.head if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in transposed] == [
        (512, 256),
        (256, 128),
        (128, 64),
        (64, 3),
    ]


def test_system_3_simclr_resnet50_of_study_b() -> None:
    recipe = SimCLR.preset("study-b")
    assert (recipe.encoder, recipe.image_size) == ("resnet50", 224)
    assert (recipe.optimizer, recipe.weight_decay, recipe.betas) == ("adam", 1e-4, (0.9, 0.999))
    assert recipe.lr == pytest.approx(3e-4)
    assert (recipe.batch_size, recipe.epochs) == (256, 100)
    assert (recipe.warmup_length, recipe.warmup, recipe.schedule) == (10, "constant", "cosine")
    assert recipe.temperature == 0.07
    assert (recipe.jitter, recipe.jitter_probability) == ((0.8, 0.8, 0.8, 0.2), 0.8)
    assert (recipe.grayscale, recipe.blur, recipe.blur_kernel, recipe.flip) == (0.2, 1.0, 5, 0.5)
    model: Any = build_on_meta(recipe)
    assert recipe.encoder_spec().architecture == "resnet50"
    assert count(model.encoder) == pytest.approx(23.5, abs=0.05)
    assert widths(model.head) == [(2048, 2048), (2048, 128)]


@pytest.mark.parametrize(
    ("name", "encoder", "width", "millions"),
    [("study-b-small", "vit_small", 384, 21.7), ("study-b-base", "vit_base", 768, 85.8)],
)
def test_systems_4_and_5_mae_vit_of_study_b(name: str, encoder: str, width: int, millions: float) -> None:
    recipe = MAE.preset(name)
    assert (recipe.encoder, recipe.image_size, recipe.patch_size) == (encoder, 224, 16)
    assert (recipe.optimizer, recipe.weight_decay, recipe.betas) == ("adamw", 0.05, (0.9, 0.95))
    assert recipe.lr == pytest.approx(1e-3)
    assert (recipe.batch_size, recipe.epochs) == (512, 100)
    assert (recipe.warmup_length, recipe.warmup, recipe.schedule) == (10, "linear", "cosine")
    assert (recipe.mask_ratio, recipe.mask_unit, recipe.shared_mask) == (0.75, "patch", False)
    assert (recipe.loss_on, recipe.norm_pix) == ("masked", False)
    assert (recipe.crop_scale, recipe.flip) == ((0.2, 1.0), 0.5)
    model: Any = build_on_meta(recipe)
    # The study's 86.6 M for the larger one count a classifier of 1,000 classes, which is not trained here.
    assert count(model.encoder) == pytest.approx(millions, abs=0.05)
    assert (model.head.embed.in_features, model.head.embed.out_features) == (width, 512)
    assert (len(model.head.blocks), model.head.blocks[0].attn.num_heads) == (8, 16)
    assert model.head.pixels.out_features == 16 * 16 * 3


def build_on_meta(recipe: Recipe) -> torch.nn.Module:
    with torch.device("meta"):
        return recipe.build()


def widths(head: Any) -> list[tuple[int, int]]:
    return [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, torch.nn.Linear)]


# Every preset works


@pytest.mark.parametrize(("method", "name"), ALL_PRESETS)
def test_preset_takes_two_real_steps_at_its_image_size(method: str, name: str) -> None:
    recipe = preset(method, name, batch_size=2)
    torch.manual_seed(0)
    model = recipe.build()
    optimizer = build_optimizer(recipe.optimizer, model, lr=1e-3, weight_decay=recipe.weight_decay, betas=recipe.betas)
    size = recipe.image_size
    matrices = {key: p for key, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    before = {key: p.detach().clone() for key, p in matrices.items()}
    for seed in range(2):
        images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
        draws = Draws(seed, rows=slice(0, 2), total=2, device=torch.device("cpu"))
        loss, _ = model(*recipe.augment(images, draws))
        assert math.isfinite(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert [key for key, p in matrices.items() if torch.equal(p, before[key])] == []


@pytest.mark.parametrize(("method", "name"), ALL_PRESETS)
def test_preset_lists_what_differs_and_gives_no_advice(method: str, name: str) -> None:
    recipe = preset(method, name)
    default = {item.name: item.default for item in fields(METHODS[method])}
    needless = [key for key, value in PRESETS[method][name].items() if value == default[key]]
    # The studies' own numbers are spelled out, even where they are the defaults today.
    assert not needless or name.startswith("study")
    assert recipe.advice() == []


def test_preset_with_changes() -> None:
    recipe = SimCLR.preset("study-b", batch_size=128, temperature=0.1)
    assert (recipe.batch_size, recipe.temperature, recipe.image_size) == (128, 0.1, 224)
    assert recipe.lr == pytest.approx(1.5e-4)  # a smaller batch takes smaller steps


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"^preset='study-c' is unknown: expected one of small-64, .*study-b$"):
        SimCLR.preset("study-c")
    with pytest.raises(RecipeError, match="MAE has no field temperature"):
        MAE.preset("study-a", temperature=0.1)


# Rules


@pytest.mark.parametrize(
    ("batch_size", "epochs", "lr", "warmup"), [(256, 100, 0.3, 10), (1024, 200, 1.2, 10), (128, 20, 0.15, 2)]
)
def test_learning_rate_and_warmup_follow_batch_and_epochs(
    batch_size: int, epochs: int, lr: float, warmup: float
) -> None:
    recipe = SimCLR(batch_size=batch_size, epochs=epochs)
    assert recipe.lr == pytest.approx(lr)
    assert recipe.warmup_length == warmup
    assert replace(recipe, accumulate=2).lr == recipe.lr
    assert replace(recipe, warmup_epochs=0).warmup_length == 0


BAD: list[tuple[type[Recipe], dict[str, Any], str]] = [
    *[
        (SimCLR, {name: value}, rf"{name}={value} is too small: expected at least 1")
        for name in ("image_size", "channels", "patch_size", "epochs", "batch_size", "accumulate")
        for value in (0, -3)
    ],
    *[
        (SimCLR, {name: value}, rf"{name}={value!r} is not a count: expected a whole number, such as 1")
        for name in ("image_size", "epochs", "batch_size", "projector_dim", "blur_kernel")
        for value in (2.5, "64")
    ],
    *[
        (MAE, {name: value}, rf"{name}={value} is out of range: expected a finite number >= 0")
        for name in ("base_lr", "weight_decay", "warmup_epochs")
        for value in (-0.1, math.nan, math.inf)
    ],
    *[
        (SimCLR, {name: value}, rf"{name}={value} is out of range: expected a number in \[0, 1\]")
        for name in ("flip", "jitter_probability", "grayscale", "blur")
        for value in (-0.1, 1.1, math.nan)
    ],
    *[
        (SimCLR, {"crop_scale": value}, r"crop_scale=\(.*\) is out of range: expected 0 < low <= high <= 1")
        for value in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.1), (0.5,), (0.1, 0.2, 0.3), (math.nan, 1.0))
    ],
    *[
        (MAE, {"betas": value}, r"betas=\(.*\) is out of range: expected two numbers in \[0, 1\)")
        for value in ((0.9, 1.0), (-0.1, 0.9), (0.9,))
    ],
    (MAE, {"clip_grad": 0.0}, r"clip_grad=0.0 is out of range: expected a number > 0"),
    (SimCLR, {"temperature": 0.0}, r"temperature=0.0 is out of range: expected a number > 0"),
    (SimCLR, {"temperature": math.nan}, r"temperature=nan is out of range: expected a number > 0"),
    (SimCLR, {"batch_size": 100, "accumulate": 8}, r"batch_size=100 is not divisible by accumulate=8: .* is 96"),
    (SimCLR, {"batch_size": 3, "accumulate": 8}, r"batch_size=3 is not divisible by accumulate=8: .* is 8"),
    (SimCLR, {"batch_size": 1}, r"batch_size=1 is out of range: expected at least 2, .*"),
    (SimCLR, {"batch_size": 8, "accumulate": 8}, r"batch_size=8 is out of range: expected at least 16, .*"),
    (SimCLR, {"blur_kernel": 4}, r"blur_kernel=4 is out of range: .* the nearest valid is 5"),
    (SimCLR, {"blur_kernel": 65, "image_size": 32}, r"blur_kernel=65 is out of range: .* up to 63; .* is 63"),
    *[
        (SimCLR, {"jitter": value}, r"jitter=\(.*\) is out of range: .* and a hue in \[0, 0.5\]")
        for value in ((0.4, 0.4, 0.4, 0.6), (-0.1, 0, 0, 0), (0.4, 0.4, 0.4), (math.inf, 0, 0, 0))
    ],
    *[
        (MAE, {"mask_ratio": value}, rf"mask_ratio={value} is out of range: .* between 0 and 1 \(the usual is 0.75\)")
        for value in (0.0, 1.0, -0.5, 75, math.nan)
    ],
    (MAE, {"mask_unit": "pixel", "norm_pix": False}, r"mask_unit='pixel' .* need a ResNet encoder: .*"),
    (MAE, {"shared_mask": True}, r".*shared_mask=True need a ResNet encoder: .*"),
    (MAE, {"encoder": "resnet18", "mask_unit": "pixel"}, r"norm_pix=True .* needs mask_unit='patch'"),
    (MAE, {"decoder_dim": 100}, r"decoder_dim=100 is not divisible by 4 \* decoder_heads=32: .* is 96"),
    (MAE, {"decoder_depth": 0}, r"decoder_depth=0 is too small: expected at least 1"),
    (SimCLR, {"optimizer": "adamW"}, r"optimizer='adamW' is unknown: expected one of lars, adamw, adam, sgd"),
    (SimCLR, {"warmup": "cosine"}, r"warmup='cosine' is unknown: expected one of linear, constant"),
    (SimCLR, {"schedule": "linear"}, r"schedule='linear' is unknown: expected one of cosine, constant"),
    (SimCLR, {"stem": "5x5"}, r"stem='5x5' is unknown: expected one of auto, 7x7, 3x3, 3x3-nopool"),
    (MAE, {"mask_unit": "pixels"}, r"mask_unit='pixels' is unknown: expected one of patch, pixel"),
    (MAE, {"loss_on": "kept"}, r"loss_on='kept' is unknown: expected one of masked, all"),
    (MAE, {"mask_ration": 0.5}, r"MAE has no field mask_ration: did you mean mask_ratio\?"),
    (SimCLR, {"view_size": 0}, r"view_size=0 is too small: expected at least 1"),
    (SimCLR, {"view_size": 24, "blur_kernel": 63}, r"blur_kernel=63 .*an odd number up to 47; the nearest valid is 47"),
    (
        SimCLR,
        {"encoder": "vit_tiny", "view_size": 48},
        r"view_size=48 needs a ResNet encoder: a ViT takes image_size alone",
    ),
    (SimCLR, {"qqq": 1}, r"SimCLR has no field qqq: expected one of encoder, image_size, .*fast_views"),
]


@pytest.mark.parametrize(("recipe", "settings", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_value_is_refused_in_one_line(recipe: type[Recipe], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}$"):
        recipe.of(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "precision='fp16' is unknown: expected one of auto, bf16, fp32"),
        ({"time_limit": -1}, "time_limit=-1 is out of range: expected a finite number >= 0"),
        ({"time_limit": math.nan}, "time_limit=nan is out of range: expected a finite number >= 0"),
        ({"save_minutes": -0.5}, "save_minutes=-0.5 is out of range: expected a finite number >= 0"),
        ({"look_epochs": -1}, "look_epochs=-1 is out of range: expected a finite number >= 0"),
        ({"cache_size": 0}, "cache_size=0 is too small: expected at least 1"),
    ],
)
def test_bad_option_of_a_run_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}$"):
        RunOptions(**settings)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (MAE(image_size=60, patch_size=16), "image_size=60 is not divisible by patch_size=16: the nearest valid is 64"),
        (MAE(image_size=60, encoder="resnet18"), "image_size=60 .* by patch_size=8: the nearest valid is 64"),
        (MAE(image_size=16, patch_size=16), "patch_size=16 is the whole image: expected at most half of image_size"),
        (SimCLR(encoder="vit_tiny", image_size=50), "image_size=50 is not divisible .* is 48"),
        (SimCLR(encoder="resnet-18"), "encoder='resnet-18' is unknown: did you mean 'resnet18'[?] .*"),
    ],
)
def test_encoder_that_cannot_be_built_is_refused_before_it_is(recipe: Recipe, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}$"):
        recipe.encoder_spec()


def test_what_is_at_the_edge_is_accepted() -> None:
    SimCLR(batch_size=2, blur_kernel=63, image_size=32, flip=1, crop_scale=(1.0, 1.0), jitter=(2.0, 0, 0, 0.5), blur=1)
    SimCLR(image_size=50).encoder_spec()  # nothing is cut into patches
    MAE(mask_unit="pixel", norm_pix=False, encoder="resnet18", image_size=61).encoder_spec()
    MAE(weight_decay=0, warmup_epochs=0, clip_grad=0.1, batch_size=1)
    RunOptions(time_limit=0, save_minutes=0, look_epochs=0)


@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        (SimCLR(image_size=32, stem="7x7"), "stem='7x7' shrinks 32 px images to 1 px maps"),
        (SimCLR(image_size=64, view_size=40, stem="7x7"), "stem='7x7' shrinks 40 px images to 2 px maps"),
        (MAE(encoder="resnet18", image_size=40, stem="7x7"), "to 2 px maps: '3x3-nopool' is usual"),
        (SimCLR(batch_size=62), "contrasted with 61 others"),
        (SimCLR(batch_size=256, accumulate=8), "contrasted with 31 others"),
    ],
)
def test_choices_that_hurt_are_named(recipe: Recipe, advice: str) -> None:
    (note,) = recipe.advice()
    assert advice in note


def test_good_choices_are_not_questioned() -> None:
    for recipe in (SimCLR(batch_size=64), SimCLR(image_size=32), SimCLR(image_size=64, stem="7x7"), MAE(batch_size=8)):
        assert recipe.advice() == []


# Plain data


def test_recipes_are_frozen_and_take_keywords_alone() -> None:
    recipe = SimCLR()
    with pytest.raises(FrozenInstanceError):
        recipe.epochs = 3  # type: ignore[misc]  # that it cannot be done is the test
    make: Callable[..., SimCLR] = SimCLR
    with pytest.raises(TypeError):
        make("resnet18")
    assert recipe == SimCLR()
    assert hash(recipe) == hash(SimCLR())


@pytest.mark.parametrize(("method", "name"), ALL_PRESETS)
def test_a_recipe_comes_back_from_json(method: str, name: str) -> None:
    recipe = preset(method, name, clip_grad=1.5)
    data = json.loads(json.dumps(recipe.to_dict()))
    assert data["method"] == method
    assert data.keys() == {"method", *(item.name for item in fields(recipe))}
    assert recipe_from_dict(data) == recipe
    assert type(recipe_from_dict(data)) is METHODS[method]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "dino"}, "method='dino' is unknown: expected one of simclr, mae"),
        ({}, "method='None' is unknown: .*"),
        ({"method": "mae", "temperature": 0.1}, "MAE has no field temperature: .*"),
        ({"method": "mae", "mask_ratio": 2}, "mask_ratio=2 is out of range: .*"),
        ({"method": "mae", "mask_ratio": "much"}, "this is not the description of a recipe: .*"),
        ([], "this is not the description of a recipe: .*"),
    ],
)
def test_description_that_is_not_a_recipe(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}$"):
        recipe_from_dict(data)


# Train


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []

    def pretrain(*arguments: Any) -> str:
        seen.append(arguments)
        return "the run"

    monkeypatch.setattr(vision_ssl.pretrain, "pretrain", pretrain)
    return seen


def test_train_on_the_class_takes_fields_and_options(calls: list[tuple[Any, ...]]) -> None:
    run: Any = SimCLR.train("photos", encoder="resnet50", epochs=3, out="here", seed=4)
    assert run == "the run"
    assert calls == [(SimCLR(encoder="resnet50", epochs=3), "photos", RunOptions(out="here", seed=4))]


def test_train_on_an_instance_uses_its_fields(calls: list[tuple[Any, ...]]) -> None:
    recipe = MAE(mask_ratio=0.6, epochs=7)
    recipe.train("photos", init="mae_vit_small", out=Path("a folder"))
    assert calls == [(recipe, "photos", RunOptions(init="mae_vit_small", out="a folder"))]


def test_train_refuses_what_it_does_not_know(calls: list[tuple[Any, ...]]) -> None:
    for train in (SimCLR.train, SimCLR(epochs=2).train):
        with pytest.raises(RecipeError, match="temperatur"):
            train("photos", temperatur=0.1)
    with pytest.raises(RecipeError, match=r"^SimCLR has no field resum: did you mean resume\?$"):
        SimCLR.train("photos", resum=True)
    with pytest.raises(RecipeError, match=r"^train\(\) got epochs: a recipe instance trains with its own fields, .*"):
        SimCLR().train("photos", epochs=2)
    with pytest.raises(RecipeError, match="epochs=0 is too small"):
        SimCLR.train("photos", epochs=0)
    assert calls == []


def test_runs_of_different_methods_and_encoders_do_not_meet() -> None:
    assert RunOptions().directory(MAE()) == Path("runs/mae-vit_small")
    assert RunOptions().directory(SimCLR(encoder="resnet34")) == Path("runs/simclr-resnet34")
    assert RunOptions(out="x/y").directory(MAE()) == Path("x/y")
