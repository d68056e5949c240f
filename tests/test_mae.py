import copy
import math
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vision_ssl.augment import Draws
from vision_ssl.encoders import sincos_position_embedding
from vision_ssl.mae import (
    ConvDecoder,
    KeepTokens,
    kept_count,
    normalise_patches,
    patchify,
    random_mask,
    unpatchify,
)
from vision_ssl.recipes import MAE

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
VIT: dict[str, Any] = {"encoder": "vit_tiny", "image_size": 32, "patch_size": 8, **SMALL}
RESNET: dict[str, Any] = {"encoder": "resnet18", "image_size": 32, "patch_size": 8}
PIXELS: dict[str, Any] = RESNET | {"mask_unit": "pixel", "norm_pix": False, "shared_mask": True, "loss_on": "all"}


def build(**fields: Any) -> Any:
    """A model in eval mode, so that BatchNorm and the order of calls do not matter."""
    torch.manual_seed(0)
    return MAE(**fields).build().eval()


def random_images(batch: int = 2, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def random_noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2))


# Patches


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), channels=st.integers(1, 5), side=st.integers(1, 5), patch=st.integers(1, 6))
def test_patches_put_together_give_the_image(batch: int, channels: int, side: int, patch: int) -> None:
    images = torch.randn(batch, channels, side * patch, side * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, side * side, patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch, channels), images)
    assert torch.equal(patchify(unpatchify(patches, patch, channels), patch), patches)


def test_patches_run_row_by_row_with_channels_last() -> None:
    images = random_images(channels=2, size=12)
    patches = patchify(images, 4)
    for row in range(3):
        for column in range(3):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[:, 3 * row + column], patch.permute(0, 2, 3, 1).flatten(1))


# Masks


@pytest.mark.parametrize(
    ("total", "ratio", "kept"),
    [
        (196, 0.75, 49),
        (64, 0.75, 16),
        (3600, 0.75, 900),
        (100, 0.9, 10),  # 9.999999999999998 in binary
        (10, 0.7, 3),  # 3.0000000000000004 in binary
        (49, 0.6, 19),  # floor of 19.6
        (4, 0.99, 1),  # something stays
        (64, 1e-9, 63),  # something goes
    ],
)
def test_number_of_kept_patches(total: int, ratio: float, kept: int) -> None:
    assert kept_count(total, ratio) == kept


@settings(deadline=None, max_examples=50)
@given(side=st.integers(2, 12), percent=st.integers(1, 99), batch=st.integers(1, 3))
def test_exactly_the_fraction_is_removed_in_every_image(side: int, percent: int, batch: int) -> None:
    noise = torch.rand(batch, side * side)
    keep, mask = random_mask(noise, percent / 100)
    expected = max(1, side * side * (100 - percent) // 100)
    expected = min(expected, side * side - 1)
    assert keep.shape == (batch, expected)
    assert mask.shape == noise.shape
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.sum(dim=1).tolist() == [side * side - expected] * batch
    assert not mask.gather(1, keep).any()
    assert all(len(set(row)) == expected for row in keep.tolist())


def test_the_largest_noise_is_removed() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.1, 0.4]])
    keep, mask = random_mask(noise, 0.5)
    assert [sorted(row) for row in keep.tolist()] == [[1, 3], [0, 2]]
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


# Views


def pixels(batch: int, channels: int = 3, size: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)


def draws(total: int, seed: int = 0, rows: slice = slice(None)) -> Draws:
    return Draws(seed, rows=rows, total=total, device=CPU)


@pytest.mark.parametrize(
    ("fields", "units"), [(VIT, 16), (RESNET, 16), (PIXELS, 1024), (VIT | {"patch_size": None}, 64)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_view_and_noise(fields: dict[str, Any], units: int, channels: int) -> None:
    recipe = MAE(**fields, channels=channels)
    view, noise = recipe.augment(pixels(3, channels), draws(3))
    assert (view.shape, view.dtype) == ((3, channels, 32, 32), torch.float32)
    assert noise.shape == (3, units)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert torch.equal(noise, noise[:1].expand(3, -1)) == recipe.shared_mask


@pytest.mark.parametrize("fields", [VIT, PIXELS])
def test_views_and_noise_do_not_depend_on_how_the_batch_is_divided(fields: dict[str, Any]) -> None:
    recipe, images = MAE(**fields), pixels(6)
    whole = recipe.augment(images, draws(6))
    for rows in (slice(0, 3), slice(5, 6)):
        part = recipe.augment(images[rows], draws(6, rows=rows))
        torch.testing.assert_close(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])


def test_whole_images_are_only_normalised() -> None:
    recipe = MAE(**PIXELS | {"image_size": 40}, crop_scale=(1.0, 1.0), flip=0.0)
    images = pixels(3)
    view, _ = recipe.augment(images, draws(3))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(view, expected, rtol=1e-4, atol=1e-5)


def test_crops_are_bicubic(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(images: Tensor, boxes: Tensor, flips: Tensor, *, size: int, interpolation: str) -> Tensor:
        seen.append((size, interpolation, flips.all().item()))
        return images[:, :, :size, :size] / 255

    monkeypatch.setattr("vision_ssl.mae.crop_resize", record)
    MAE(**VIT, flip=1.0).augment(pixels(2), draws(2))
    assert seen == [(32, "bicubic", True)]


# Loss


def patch_by_patch(recipe: MAE, images: Tensor, prediction: Tensor, mask: Tensor) -> float:
    """The loss as the paper states it: per-patch normalisation, and the mean over removed patches."""
    size = 1 if recipe.mask_unit == "pixel" else recipe.patch_size
    assert size is not None
    side = images.shape[-1] // size
    errors: list[float] = []
    for image, predicted, removed in zip(images, prediction, mask, strict=True):
        for number in range(side * side):
            if recipe.loss_on == "masked" and not removed[number]:
                continue
            row, column = divmod(number, side)
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            target = [patch[c, y, x].item() for y in range(size) for x in range(size) for c in range(len(patch))]
            if recipe.norm_pix:
                mean = sum(target) / len(target)
                variance = sum((value - mean) ** 2 for value in target) / (len(target) - 1)
                target = [(value - mean) / math.sqrt(variance + 1e-6) for value in target]
            error = [(p - t) ** 2 for p, t in zip(predicted[number].tolist(), target, strict=True)]
            errors.append(sum(error) / len(error))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    "fields",
    [
        VIT,
        VIT | {"norm_pix": False},
        VIT | {"loss_on": "all", "mask_ratio": 0.5},
        RESNET,
        PIXELS,
        PIXELS | {"loss_on": "masked", "shared_mask": False},
    ],
    ids=["vit", "raw pixels", "all patches", "resnet patches", "resnet pixels", "resnet masked pixels"],
)
def test_loss_is_the_papers(fields: dict[str, Any]) -> None:
    recipe, model = MAE(**fields), build(**fields)
    images = random_images()
    noise = random_noise(2, 1024 if recipe.mask_unit == "pixel" else 16)
    loss, metrics = model(images, noise)
    keep, mask = random_mask(noise, recipe.mask_ratio)
    with torch.no_grad():
        expected = patch_by_patch(recipe, images, model.predict(images, keep, mask), mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics == {}


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_kept_patches_count_only_on_request(monkeypatch: pytest.MonkeyPatch, loss_on: str) -> None:
    model = build(**VIT, norm_pix=False, loss_on=loss_on)
    images, noise = random_images(), random_noise(2, 16)
    keep, mask = random_mask(noise, 0.75)
    prediction = model.predict(images, keep, mask)
    monkeypatch.setattr(model, "predict", lambda *_: prediction)
    before = model(images, noise)[0].item()
    prediction = prediction + 5 * (1 - mask)[:, :, None]
    assert (model(images, noise)[0].item() == before) == (loss_on == "masked")
    prediction = prediction + 5 * mask[:, :, None]
    assert model(images, noise)[0].item() > before + 5


def test_normalised_patches_have_mean_zero_and_variance_one() -> None:
    patches = 3 + 2 * torch.randn(2, 5, 300)
    patches[0, 0] = 0.7  # a flat patch has no contrast
    normal, mean, std = normalise_patches(patches)
    torch.testing.assert_close(normal.mean(2), torch.zeros(2, 5), rtol=0, atol=1e-3)
    torch.testing.assert_close(normal.std(2).flatten()[1:], torch.ones(9), rtol=1e-3, atol=0)
    torch.testing.assert_close(normal * std + mean, patches)
    assert normal.isfinite().all()


def test_loss_is_float32_under_autocast() -> None:
    model = build(**VIT)
    images, noise = random_images(), random_noise(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(images, noise)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(images, noise)[0].item(), rel=0.01)


# What the encoder sees


@pytest.mark.parametrize("fields", [VIT, RESNET, PIXELS], ids=["vit", "patches", "pixels"])
def test_the_prediction_depends_on_what_is_kept_alone(fields: dict[str, Any]) -> None:
    model = build(**fields)
    images = random_images()
    units = 1024 if fields.get("mask_unit") == "pixel" else 16
    keep, mask = random_mask(random_noise(1, units).expand(2, -1), 0.75)
    patches = patchify(images, 1 if units == 1024 else 8)
    with torch.no_grad():
        before = model.predict(images, keep, mask)
        for change, same in ((mask, True), (1 - mask, False)):
            changed = patches + 3 * change[:, :, None]
            after = model.predict(unpatchify(changed, 1 if units == 1024 else 8, 3), keep, mask)
            assert torch.equal(before, after) == same


def test_the_encoder_gets_kept_tokens_with_their_own_positions() -> None:
    model = build(**VIT)
    images = random_images()
    keep, mask = random_mask(random_noise(2, 16), 0.75)
    seen: list[Tensor] = []
    model.encoder.blocks.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.predict(images, keep, mask)

    encoder = model.encoder
    for row in range(2):
        tokens = [encoder.cls_token[0, 0] + encoder.pos_embed[0, 0]]
        for index in keep[row].tolist():
            y, x = divmod(index, 4)
            patch = images[row, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            embedded = (encoder.patch_embed.proj.weight * patch).sum(dim=(1, 2, 3)) + encoder.patch_embed.proj.bias
            tokens.append(embedded + encoder.pos_embed[0, 1 + index])
        torch.testing.assert_close(seen[0][row], torch.stack(tokens), rtol=1e-4, atol=1e-4)


def test_the_decoder_puts_tokens_back_where_they_stood() -> None:
    decoder = build(**VIT).head
    decoder.blocks, decoder.norm = nn.Identity(), nn.Identity()
    keep = torch.tensor([[5, 2, 9, 14]])
    tokens = torch.randn(1, 5, 192)
    predicted = decoder(tokens, keep, 16)
    position = sincos_position_embedding(32, 4)[0]
    for number in range(16):
        if number in keep[0]:
            own = decoder.embed(tokens[0, 1 + keep[0].tolist().index(number)])
        else:
            own = decoder.mask_token[0, 0]
        torch.testing.assert_close(predicted[0, number], decoder.pixels(own + position[number]))


def test_the_order_of_the_kept_tokens_does_not_matter() -> None:
    model = build(**VIT)
    images = random_images()
    keep, mask = random_mask(random_noise(2, 16), 0.5)
    with torch.no_grad():
        torch.testing.assert_close(
            model.predict(images, keep, mask), model.predict(images, keep.flip(1), mask), rtol=1e-4, atol=1e-5
        )


def test_nothing_is_masked_at_inference() -> None:
    model = build(**VIT)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, global_pool="avg", fc_norm=False
    ).eval()
    plain.load_state_dict(model.encoder.state_dict())
    images = random_images()
    for _ in range(2):
        assert torch.equal(model.encoder(images), plain(images))
        assert model.encoder.forward_features(images).shape == (2, 17, 192)
        model.train()
        model(images, random_noise(2, 16))
        model.eval()


def test_a_failed_step_leaves_no_mask_behind() -> None:
    model = build(**VIT)
    images = random_images()
    expected = model.encoder(images)
    with pytest.raises(AssertionError):
        model(random_images(size=40), random_noise(2, 25))  # timm: another size than the encoder's
    assert torch.equal(model.encoder(images), expected)


def test_dropping_tokens_adds_nothing_to_the_state() -> None:
    model = build(**VIT)
    assert isinstance(model.encoder.patch_drop, KeepTokens)
    assert not [name for name in model.state_dict() if "drop" in name or "position" in name]
    twin = copy.deepcopy(model)
    twin.drop.keep = torch.zeros(1, 1, dtype=torch.long)
    assert twin.encoder.patch_drop is twin.drop
    assert model.drop.keep is None


def test_positions_are_fixed_and_all_else_learns() -> None:
    model = build(**VIT)
    model(random_images(), random_noise(2, 16))[0].backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert still == ["encoder.pos_embed"]
    torch.testing.assert_close(model.encoder.pos_embed, sincos_position_embedding(192, 4, prefix_tokens=1))
    torch.testing.assert_close(model.head.position, sincos_position_embedding(32, 4, prefix_tokens=1))
    dead = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert dead == []


def test_initial_weights() -> None:
    model = build(**VIT)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name
    patch = model.encoder.patch_embed.proj.weight
    assert 0.9 < patch.abs().max() / math.sqrt(6 / (192 + 192)) <= 1
    assert model.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.head.mask_token.std().item() == pytest.approx(0.02, rel=0.4)


# The convolutional form


@pytest.mark.parametrize("size", [32, 60, 64])
def test_prediction_has_the_size_of_the_image(size: int) -> None:
    recipe = MAE(encoder="resnet18", image_size=size, stem="7x7", mask_unit="pixel", norm_pix=False, channels=5)
    with torch.device("meta"):
        model: Any = recipe.build()
        mask = torch.empty(2, size * size)
        prediction = model.predict(torch.empty(2, 5, size, size), mask, mask)
    assert prediction.shape == (2, size * size, 5)


def test_decoder_of_transposed_convolutions() -> None:
    decoder = ConvDecoder(width=64, channels=5)
    assert decoder(torch.randn(2, 64, 2, 3)).shape == (2, 5, 32, 48)
    assert [type(layer).__name__ for layer in decoder] == ["ConvTranspose2d", "ReLU"] * 3 + ["ConvTranspose2d"]


def test_removed_pixels_are_zero_for_the_encoder_in_all_images_alike() -> None:
    recipe, model = MAE(**PIXELS), build(**PIXELS)
    seen: list[Tensor] = []
    model.encoder.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images, noise = recipe.augment(pixels(4), draws(4))
    model(images, noise)
    zero = (seen[0] == 0).all(dim=1)
    assert zero.float().mean().item() == pytest.approx(0.75)
    assert torch.equal(zero, zero[:1].expand(4, -1, -1))
    assert torch.equal(seen[0][:, :, ~zero[0]], images[:, :, ~zero[0]])


# Reconstruction


@pytest.mark.parametrize("fields", [VIT, VIT | {"norm_pix": False}, RESNET, PIXELS])
def test_reconstruction_keeps_what_was_kept_and_predicts_the_rest(fields: dict[str, Any]) -> None:
    recipe, model = MAE(**fields), build(**fields)
    images = random_images()
    size = 1 if recipe.mask_unit == "pixel" else 8
    noise = random_noise(2, (32 // size) ** 2)
    masked, shown = model.reconstruct(images, noise)
    assert not shown.requires_grad
    keep, mask = random_mask(noise, recipe.mask_ratio)
    removed = unpatchify(mask[:, :, None].expand(-1, -1, 3 * size * size), size, 3).bool()
    assert torch.equal(masked[~removed], images[~removed])
    assert not masked[removed].any()
    assert torch.equal(shown[~removed], images[~removed])

    with torch.no_grad():
        prediction = model.predict(images, keep, mask)
    if recipe.norm_pix:
        patches = patchify(images, size)
        prediction = prediction * patches.std(2, keepdim=True) + patches.mean(2, keepdim=True)
    torch.testing.assert_close(shown[removed], unpatchify(prediction, size, 3)[removed], rtol=1e-4, atol=1e-4)


def test_training_learns_to_predict() -> None:
    model = build(**VIT, norm_pix=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ramp = torch.linspace(-1, 1, 32).expand(4, 3, 32, 32) * torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None, None, None]
    losses = []
    for step in range(25):
        loss, _ = model(ramp, torch.rand(4, 16, generator=torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
