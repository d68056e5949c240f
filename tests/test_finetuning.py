import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.layers import DropPath  # type: ignore[attr-defined]  # timm exports by plain imports
from timm.loss import SoftTargetCrossEntropy  # type: ignore[attr-defined]  # likewise
from torch import Tensor, nn

from vision_ssl import Report, finetune, finetuning, hub
from vision_ssl.augment import Draws
from vision_ssl.data import ImageSet, Preprocess, channel_statistics
from vision_ssl.encoders import fix_position_embedding, resolve_encoder
from vision_ssl.errors import DataError, RecipeError, TrainingError
from vision_ssl.finetuning import layer_groups, mix, smoothed, view, with_head
from vision_ssl.options import FineTuning

SIZE = 16
PREPROCESS = Preprocess(SIZE, *channel_statistics(3))
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 12, "device": "cpu"}
PLAIN: dict[str, Any] = {"mixup": 0, "cutmix": 0, "erase": 0, "drop_path": 0, "label_smoothing": 0}


def encoder(name: str = "vit_tiny") -> hub.Encoder:
    spec = resolve_encoder(name, image_size=SIZE, patch_size=8)
    torch.manual_seed(0)
    return hub.attach(spec.build(), SIZE, 3, card={}).eval()


def images(seed: int, n: int = 24) -> ImageSet:
    """Noise with a channel that stands out: the class."""
    labels = torch.arange(n) % 3
    pixels = torch.randint(120, (n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    pixels[torch.arange(n), labels] += 130
    names = ("class 0", "class 1", "class 2")
    return ImageSet(pixels.byte(), labels, names, tuple(map(str, range(n))), f"noise {seed}", str(seed) * 64)


TRAIN, VAL = images(1), images(2)


def tune(module: nn.Module, **settings: Any) -> Report:
    return finetune(module, train=TRAIN, val=VAL, **(QUICK | settings))


def state(module: nn.Module) -> dict[str, Tensor]:
    """The encoder without a head."""
    heads = ("head.", "fc.")
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if not name.startswith(heads)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def draws(seed: int, total: int = 8) -> Draws:
    return Draws(seed, rows=slice(None), total=total, device=torch.device("cpu"))


# --- the whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18"])
def test_two_steps(name: str) -> None:
    module = encoder(name)
    before, keys, generator = state(module), list(module.state_dict()), torch.get_rng_state()
    report = tune(module, seed=5)
    assert (report.protocol, report.n_train, report.n_val, report.seed) == ("finetune", 24, 24, 5)
    assert (report.train_digest, report.val_digest) == (TRAIN.digest, VAL.digest)
    settings = {name: report.settings[name] for name in ("epochs", "epochs_done", "layer_decay", "mixup")}
    assert settings == {"epochs": 1, "epochs_done": 1, "layer_decay": 0.75, "mixup": 0.8}
    assert list(module.state_dict()) == keys  # it has no head
    assert same(state(module), before)
    assert not module.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_it_learns() -> None:
    module = encoder()
    report = tune(module, **PLAIN, epochs=6, batch_size=6, base_lr=0.02)
    assert report.accuracy == report.train_accuracy == 100
    assert tune(module, base_lr=0.0).accuracy < 70


def test_the_seed_decides_everything() -> None:
    trained = []
    for seed in (3, 3, 4):
        module = encoder()
        tune(module, in_place=True, seed=seed)
        trained.append(module.state_dict())
    assert same(trained[0], trained[1])
    assert not same(trained[0], trained[2])


def test_in_place_the_module_itself_is_trained() -> None:
    module = encoder()
    report = tune(module, in_place=True)
    assert not same(state(module), state(encoder()))
    with torch.inference_mode():
        logits = module(PREPROCESS.normalise(VAL.pixels))
    assert np.array_equal(report.predictions, logits.argmax(dim=1).numpy())
    with torch.inference_mode():
        hits = module(PREPROCESS.normalise(TRAIN.pixels)).argmax(dim=1) == TRAIN.labels
    assert report.train_accuracy == pytest.approx(100 * float(hits.double().mean()))


def test_weights_in_bfloat16_are_trained_in_float32() -> None:
    module = encoder().bfloat16()
    tune(module, in_place=True)
    assert {weights.dtype for weights in module.parameters()} == {torch.float32}


def test_a_step_is_that_of_torchs_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step on the whole training set, whose views are the images as they are."""
    monkeypatch.setattr(finetuning, "view", lambda images, preprocess, draws, *, erase: preprocess.normalise(images))
    module = encoder()
    settings = PLAIN | {"label_smoothing": 0.2, "batch_size": 24, "base_lr": 0.01, "layer_decay": 1, "epochs": 2}
    tune(module, **settings, warmup_epochs=0, in_place=True, seed=6)

    expected = encoder()
    torch.manual_seed(6)
    cast(Any, expected).reset_classifier(3)
    expected.train()
    plain = ("bias", "norm", "token", "pos_embed")
    groups = [
        {"params": [p for name, p in expected.named_parameters() if any(w in name for w in plain) == vector]}
        | {"weight_decay": 0.0 if vector else 0.05}
        for vector in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01 * 24 / 256, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    for _ in range(2):
        logits = expected(PREPROCESS.normalise(TRAIN.pixels))
        F.cross_entropy(logits, cast(Tensor, TRAIN.labels), label_smoothing=0.2).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for (name, ours), theirs in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        # Adam's first steps, 1e-3 here, are as long where the gradient is hardly more than rounding.
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0, msg=name)


def test_the_exponential_mean_of_the_weights_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters and BatchNorm's statistics, from the start on, with a lower decay in the first step."""
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 24, "in_place": True, "base_lr": 0.05, "warmup_epochs": 0}
    start: dict[str, Tensor] = {}

    def stop_after(epochs: int) -> nn.Module:
        module, clock = encoder("resnet18"), iter([0.0] * epochs)
        monkeypatch.setattr(finetuning, "time", SimpleNamespace(monotonic=lambda: next(clock, 1e9)))
        tune(module, **settings, time_limit=1)
        monkeypatch.undo()
        return module

    def with_start(*arguments: Any) -> nn.Module:
        model = with_head(*arguments)
        start.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    after = [stop_after(epochs).state_dict() for epochs in (1, 2, 3)]
    module = encoder("resnet18")
    monkeypatch.setattr(finetuning, "with_head", with_start)
    report = tune(module, **settings, ema=0.15)
    expected = start
    for decay, state_dict in zip((0.1, 0.15, 0.15), after, strict=True):
        expected = {name: decay * mean + (1 - decay) * state_dict[name] for name, mean in expected.items()}
    for name, ours in module.state_dict().items():
        if ours.is_floating_point():
            torch.testing.assert_close(ours, expected[name], atol=1e-6, rtol=1e-5, msg=name)
        else:
            assert torch.equal(ours, after[2][name]), name
    assert not torch.equal(module.state_dict()["fc.weight"], after[2]["fc.weight"])
    assert report.settings["ema"] == 0.15
    with torch.inference_mode():
        logits = module(PREPROCESS.normalise(VAL.pixels))
    assert np.array_equal(report.predictions, logits.argmax(dim=1).numpy())


def test_a_preset_is_where_settings_start_from() -> None:
    assert FineTuning.of() == FineTuning.of("mae") == FineTuning()
    small = FineTuning.of("small-data", epochs=3)
    assert (small.epochs, small.batch_size, small.ema, small.mixup) == (3, 32, 0.99, 0.8)
    report = tune(encoder(), preset="small-data", batch_size=8)
    assert (report.settings["batch_size"], report.settings["ema"]) == (8, 0.99)


def test_images_that_are_in_both_splits_are_pointed_out() -> None:
    pixels = VAL.pixels.clone()
    pixels[3] = TRAIN.pixels[7]
    with pytest.warns(UserWarning, match="val: of 24 images, 1 are in train too, pixel by pixel"):
        finetune(encoder(), train=TRAIN, val=replace(VAL, pixels=pixels), **QUICK)


def test_the_first_classes_alone() -> None:
    report = finetune(encoder(), train=TRAIN, val=VAL, **(QUICK | {"batch_size": 8}), classes=2)
    assert (list(report.per_class), report.n_train, report.n_val) == (["class 0", "class 1"], 16, 16)


def test_no_epoch_begins_after_the_time_limit() -> None:
    report = tune(encoder(), epochs=5, time_limit=0)
    assert (report.settings["epochs"], report.settings["epochs_done"]) == (5, 1)


def test_validation_images_are_seen_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train, predict = finetuning._train, finetuning._predict

    def watch(kind: Any, name: str) -> Any:
        def call(model: nn.Module, given: ImageSet, *rest: Any) -> Any:
            seen.append(f"{name} {given.name}")
            return kind(model, given, *rest)

        return call

    monkeypatch.setattr(finetuning, "_train", watch(train, "train"))
    monkeypatch.setattr(finetuning, "_predict", watch(predict, "predict"))
    tune(encoder())
    assert seen == ["train noise 1", "predict noise 1", "predict noise 2"]


def test_top5_is_of_the_five_likeliest_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "SCORED", 5)
    labels = torch.arange(24) % 8
    many = replace(VAL, labels=labels, classes=tuple("abcdefgh"))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8, bias=False))
    classes, top5 = finetuning._predict(model, many, PREPROCESS, torch.device("cpu"))
    with torch.inference_mode():
        likeliest = model(PREPROCESS.normalise(VAL.pixels)).topk(5).indices
    assert torch.equal(classes, likeliest[:, 0])
    assert torch.equal(top5, (likeliest == labels[:, None]).any(dim=1))
    assert 0 < top5.sum() < 24


# --- the head, the layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "stem", "last", "head"),
    [
        ("vit_tiny", 14, "patch_embed.proj.weight", "blocks.11.mlp.fc1.bias", "head.weight"),
        ("resnet18", 10, "conv1.weight", "layer4.1.bn2.bias", "fc.weight"),
        ("resnet50", 18, "conv1.weight", "layer4.2.bn2.bias", "fc.weight"),
    ],
)
def test_learning_rates_fall_from_the_head_to_the_stem(name: str, layers: int, stem: str, last: str, head: str) -> None:
    """There are the stem, the blocks (with the last of them the norm of a ViT), and the head."""
    model = with_head(encoder(name), 3, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = layer_groups(model, FineTuning(layer_decay=0.5, weight_decay=0.1))
    scale = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    decay = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert scale.keys() == decay.keys() == set(names.values())
    assert sorted(set(scale.values())) == [0.5**power for power in range(layers - 1, -1, -1)]
    assert (scale[stem], scale[last], scale[head]) == (0.5 ** (layers - 1), 0.5, 1)
    for name, value in decay.items():
        plain = cast(Tensor, model.get_parameter(name)).ndim <= 1 or name in ("cls_token", "pos_embed")
        assert value == (0.0 if plain else 0.1), name


def test_each_layer_is_trained_at_its_own_rate() -> None:
    module = encoder()
    tune(module, layer_decay=0, in_place=True)
    assert same(state(module), state(encoder()))  # the head alone was


def test_a_fixed_position_embedding_stays() -> None:
    module = encoder()
    fix_position_embedding(cast(Any, module))
    table = state(module)["pos_embed"]
    tune(module, in_place=True)
    assert torch.equal(module.state_dict()["pos_embed"], table)


@pytest.mark.parametrize(("name", "branches"), [("vit_tiny", 24), ("resnet18", 8), ("resnet50", 16)])
def test_branches_are_dropped_more_often_towards_the_head(name: str, branches: int) -> None:
    model = with_head(encoder(name), 3, 0.3)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert len(rates) == branches
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)
    pixels = PREPROCESS.normalise(TRAIN.pixels)
    model.eval()
    with torch.inference_mode():  # when it is not trained, nothing is dropped
        features = cast(Any, model).forward_head(cast(Any, model).forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(features, encoder(name)(pixels))


# --- the images ----------------------------------------------------------------------------------------------


def test_views_depend_on_the_seed_alone() -> None:
    pixels = TRAIN.pixels[:8]
    first, again, other = (view(pixels, PREPROCESS, draws(seed), erase=0.5) for seed in (1, 1, 2))
    assert first.shape == (8, 3, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_erasing_puts_noise_into_a_rectangle_of_some_images() -> None:
    pixels = torch.full((400, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    plain = view(pixels, PREPROCESS, draws(1, 400), erase=0.0)
    grey = PREPROCESS.normalise(pixels[:1])
    torch.testing.assert_close(plain, grey.expand_as(plain), atol=1e-5, rtol=0)
    changed = ((view(pixels, PREPROCESS, draws(1, 400), erase=0.25) - plain).abs() > 1e-4).any(dim=1)
    chosen = changed.flatten(1).any(dim=1)
    assert 0.18 < chosen.float().mean() < 0.32
    shares = changed[chosen].float().mean(dim=(1, 2))
    assert shares.min() < 0.06
    assert 0.25 < shares.max() < 0.4
    for mask in changed[chosen]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns)
        assert all(len(line.nonzero()) == line.nonzero().max() - line.nonzero().min() + 1 for line in (rows, columns))
    whole = view(pixels, PREPROCESS, draws(1, 400), erase=1.0)
    std = torch.tensor(PREPROCESS.std)[:, None]
    noise = (
        whole.movedim(1, 0)[:, ((whole - plain).abs() > 1e-4).all(dim=1)] * std + torch.tensor(PREPROCESS.mean)[:, None]
    )
    assert 0 <= noise.min() < 0.01
    assert 0.99 < noise.max() <= 1.00001
    assert noise.mean() == pytest.approx(0.5, abs=0.02)


def batch(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    pixels = torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 3
    return pixels, labels, smoothed(labels, 3, 0.1)


def test_mixup_is_timms() -> None:
    pixels, labels, targets = batch()
    shares = []
    for seed in range(60):
        mixed, mixed_targets = mix(pixels, targets, mixup=0.8, cutmix=0, rng=np.random.default_rng(seed))
        share = np.random.default_rng(seed).beta(0.8, 0.8)
        torch.testing.assert_close(mixed, pixels * share + pixels.flip(0) * (1 - share))
        expected = mixup_target(labels, 3, share, smoothing=0.1)
        torch.testing.assert_close(mixed_targets, expected.float(), atol=1e-6, rtol=0)
        shares.append(share)
    assert min(shares) < 0.1
    assert max(shares) > 0.9


def test_cutmix_weighs_targets_by_what_is_seen() -> None:
    pixels, labels, targets = batch()
    seen = []
    for seed in range(60):
        mixed, mixed_targets = mix(pixels, targets, mixup=0, cutmix=1.0, rng=np.random.default_rng(seed))
        own = (mixed == pixels).all(dim=1)
        assert torch.equal(mixed.movedim(1, -1)[~own], pixels.flip(0).movedim(1, -1)[~own])
        assert (own == own[0]).all()
        share = float(own[0].float().mean())
        torch.testing.assert_close(
            mixed_targets, mixup_target(labels, 3, share, smoothing=0.1).float(), atol=1e-6, rtol=0
        )
        foreign = (~own[0]).nonzero()
        if len(foreign):
            height, width = (foreign.max(dim=0).values - foreign.min(dim=0).values + 1).tolist()
            assert height * width == len(foreign)
        seen.append(share)
    assert min(seen) < 0.3
    assert max(seen) > 0.9


def test_both_kinds_of_mixing_take_turns_at_random() -> None:
    pixels, _, targets = batch()
    blended = 0
    for seed in range(200):
        mixed, _ = mix(pixels, targets, mixup=0.8, cutmix=1.0, rng=np.random.default_rng(seed))
        copied = (mixed == pixels) | (mixed == pixels.flip(0))
        blended += not bool(copied.all())
    assert 70 < blended < 130
    assert mix(pixels, targets, mixup=0, cutmix=0, rng=np.random.default_rng(0)) == (pixels, targets)


def test_the_loss_is_timms() -> None:
    _, labels, targets = batch()
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(F.cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))
    torch.testing.assert_close(F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.1))


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "finetune has no field epoch: did you mean epochs"),
        ({"preset": "small"}, "preset='small' is unknown: expected one of mae, small-data"),
        ({"ema": 1.0}, r"ema=1.0 is out of range: expected a number in \[0, 1\)"),
        ({"epochs": 0}, "epochs=0 is too small"),
        ({"batch_size": 25}, "batch_size=25: expected at most 24, the number of images"),
        ({"drop_path": 1.0}, r"drop_path=1.0 is out of range: expected a number in \[0, 1\)"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 is out of range"),
        ({"mixup": -1}, "mixup=-1 is out of range"),
        ({"erase": math.nan}, "erase=nan is out of range"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tune(encoder(), **settings)


def test_what_is_no_encoder() -> None:
    module = nn.Flatten()
    with pytest.raises(DataError, match="encoder: Flatten has no preprocess"):
        tune(module)
    module.preprocess = PREPROCESS  # type: ignore[assignment]  # nn.Module wants tensors
    with pytest.raises(RecipeError, match="encoder: Flatten has no reset_classifier: expected a timm module"):
        tune(module)
    spec = resolve_encoder("resnet18", image_size=SIZE)
    maps = hub.attach(spec.build(global_pool=""), SIZE, 3, card={})
    tokens = encoder()
    tokens.global_pool = ""  # type: ignore[assignment]  # nn.Module wants tensors
    for unpooled in (maps, tokens):
        with pytest.raises(RecipeError, match="encoder: has global_pool='', and does not pool: expected features"):
            tune(unpooled)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="val: holds the same images as train"):
        finetune(encoder(), train=TRAIN, val=TRAIN, **QUICK)
    renamed = replace(VAL, classes=("class 0", "x", "class 2"))
    with pytest.raises(DataError, match="val: class 1 is 'x', expected 'class 1' as in train"):
        finetune(encoder(), train=TRAIN, val=renamed, **QUICK)
    single = replace(TRAIN, labels=torch.zeros(24, dtype=torch.int64))
    with pytest.raises(DataError, match="train: 24 images of 1 class, expected at least 2 classes"):
        finetune(encoder(), train=single, val=VAL, **QUICK)
    few = TRAIN.select(cast(Tensor, TRAIN.labels) != 1)
    with pytest.warns(UserWarning, match="val: 8 images of class 1 cannot be recognised") as caught:
        finetune(encoder(), train=few, val=VAL, **QUICK)
    assert caught[0].filename == __file__


def test_a_loss_that_is_not_finite() -> None:
    module = encoder()
    with torch.no_grad():
        cast(Any, module).cls_token.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1: try a lower base_lr"):
        tune(module)


def test_an_encoder_by_its_name(tmp_path: Path) -> None:
    spec = resolve_encoder("vit_tiny", image_size=SIZE, patch_size=8)
    module = encoder()
    hub.save(tmp_path / "weights", module, spec, card={})
    by_name = tune(cast(Any, tmp_path / "weights"))
    assert np.array_equal(by_name.predictions, tune(hub.load(tmp_path / "weights")).predictions)
