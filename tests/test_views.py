from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor

from vision_ssl.augment import LARGE, Draws, random_boxes
from vision_ssl.recipes import SimCLR
from vision_ssl.views import Choices, blur_taps, exact_view, fast_view

CPU = torch.device("cpu")


def pixels(batch: int, channels: int = 3, size: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)


def draws(total: int, seed: int = 0, rows: slice = slice(None)) -> Draws:
    return Draws(seed, rows=rows, total=total, device=CPU)


STILL: dict[str, Any] = {"crop_scale": (1.0, 1.0), "flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0}
STRONG = SimCLR(image_size=32, batch_size=6, blur=0.5, grayscale=0.3, jitter=(0.8, 0.8, 0.8, 0.2))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_two_different_views_of_each_image(channels: int, fast: bool) -> None:
    recipe = SimCLR(image_size=32, channels=channels, blur=1.0, batch_size=2, fast_views=fast)
    views = recipe.augment(pixels(6, channels), draws(6))
    assert len(views) == 2
    assert all(view.shape == (6, channels, 32, 32) and view.dtype == torch.float32 for view in views)
    assert not any(torch.allclose(*pair) for pair in zip(*views, strict=True))


@pytest.mark.parametrize("fast", [False, True])
def test_smaller_views_are_what_images_of_that_size_would_give(fast: bool) -> None:
    direct = SimCLR(image_size=24, batch_size=2, blur=1.0, fast_views=fast)
    smaller = replace(direct, image_size=64, view_size=24)
    for own, expected in zip(*(recipe.augment(pixels(6), draws(6)) for recipe in (smaller, direct)), strict=True):
        assert own.shape == (6, 3, 24, 24)
        assert own.equal(expected)


@pytest.mark.parametrize("fast", [False, True])
def test_views_of_a_batch_do_not_depend_on_how_it_is_divided(fast: bool) -> None:
    images, recipe = pixels(6), replace(STRONG, fast_views=fast)
    whole = recipe.augment(images, draws(6))
    for rows in (slice(0, 3), slice(3, 6), slice(5, 6)):
        part = recipe.augment(images[rows], draws(6, rows=rows))
        for own, all_rows in zip(part, whole, strict=True):
            torch.testing.assert_close(own, all_rows[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_of_a_whole_batch_as_on_a_gpu_equal_those_of_blocks(
    monkeypatch: pytest.MonkeyPatch, channels: int, fast: bool
) -> None:
    images, recipe = pixels(150, channels), replace(STRONG, channels=channels, fast_views=fast)
    blocks = recipe.augment(images, draws(150))
    for module in ("augment", "color"):
        monkeypatch.setattr(f"vision_ssl.{module}.whole_batch", lambda images: True)
    for whole, own in zip(recipe.augment(images, draws(150)), blocks, strict=True):
        torch.testing.assert_close(whole, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_views_follow_from_the_seed(fast: bool) -> None:
    images, recipe = pixels(4), replace(STRONG, fast_views=fast)
    for view, again, other in zip(*(recipe.augment(images, draws(4, seed)) for seed in (1, 1, 2)), strict=True):
        assert torch.equal(view, again)
        assert not torch.allclose(view, other)


def test_views_without_strength_are_normalised_crops() -> None:
    recipe = SimCLR(image_size=40, batch_size=2, **STILL)
    images = pixels(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    for view in recipe.augment(images, draws(3)):
        torch.testing.assert_close(view, expected, rtol=1e-4, atol=1e-5)


def test_flip_and_crop_scale_are_the_recipes() -> None:
    quiet: dict[str, Any] = {"batch_size": 2, "jitter_probability": 0.0, "grayscale": 0.0}
    plain, mirrored = (
        SimCLR(image_size=40, crop_scale=(1.0, 1.0), flip=flip, **quiet).augment(pixels(2), draws(2))[0]
        for flip in (0.0, 1.0)
    )
    torch.testing.assert_close(mirrored, plain.flip(3))

    ramp = torch.arange(40, dtype=torch.uint8).expand(50, 3, 40, 40)  # a crop's span tells its width
    views, _ = SimCLR(image_size=40, crop_scale=(0.1, 0.1), flip=0.0, **quiet).augment(ramp, draws(50))
    widths = (views[:, 0, 0, -1] - views[:, 0, 0, 0]) * 0.229 * 255 + 1
    torch.testing.assert_close(widths, random_boxes(draws(50), 40, 40, scale=(0.1, 0.1))[:, 3], rtol=0, atol=1.0)


@pytest.mark.parametrize(
    ("image_size", "given", "taps"), [(64, None, 7), (32, None, 3), (224, None, 23), (16, None, 1), (64, 5, 5)]
)
def test_blur_has_a_tenth_of_the_image_in_taps(image_size: int, given: int | None, taps: int) -> None:
    assert blur_taps(SimCLR(image_size=image_size, blur_kernel=given, batch_size=2)) == taps


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("taps", [1, 3, 7])
def test_blur_spreads_a_point_over_its_taps(taps: int, fast: bool) -> None:
    recipe = SimCLR(image_size=40, batch_size=2, blur=1.0, blur_kernel=taps, fast_views=fast, **STILL)
    point = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    point[:, :, 20, 20] = 255
    choices = Choices.draw(recipe, point, draws(1))._replace(sigma=torch.tensor([2.0]))
    view = (fast_view if fast else exact_view)(recipe, point, choices)[0, 0]
    assert (view > view.min() + 1e-6).any(dim=0).sum() == taps


# Fast views


def both(recipe: SimCLR, images: Tensor) -> tuple[Tensor, Tensor]:
    choices = Choices.draw(recipe, images, draws(len(images)))
    return exact_view(recipe, images, choices), fast_view(recipe, images, choices)


MILD: dict[str, Any] = {"batch_size": 2, "image_size": 32, "jitter": (0.2, 0.2, 0.2, 0.0), "grayscale": 0.3}


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {"blur": 0.0},  # each jitter, in each order, without a clamp
        {"jitter_probability": 0.0, "blur": 0.7},
        {"jitter_probability": 0.0, "grayscale": 0.0, "blur": 0.0, "image_size": 48},
        {"jitter_probability": 0.0, "blur": 0.7, "image_size": LARGE},
    ],
)
def test_fast_views_equal_exact_ones_where_nothing_is_clamped_and_no_hue_turns(
    channels: int, changes: dict[str, Any]
) -> None:
    images = 80 + pixels(60, channels) // 4  # far from black and white
    exact, fast = both(SimCLR(**(MILD | {"channels": channels} | changes)), images)
    torch.testing.assert_close(fast, exact, rtol=0, atol=2e-5)


def test_fast_hue_turns_red_to_green_as_the_exact_one() -> None:
    colours = torch.tensor([[200, 50, 50], [50, 200, 50], [50, 50, 200], [90, 90, 90]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(-1, -1, 32, 32)
    recipe = SimCLR(batch_size=2, image_size=32, jitter=(0, 0, 0, 0.5), jitter_probability=1.0, grayscale=0.0)
    choices = Choices.draw(recipe, images, draws(4))
    for third in (-1 / 3, 1 / 3):
        choices.jitter.factors[:, 3] = third
        exact, fast = (view(recipe, images, choices) for view in (exact_view, fast_view))
        torch.testing.assert_close(fast, exact, rtol=0, atol=2e-5)


def test_fast_views_are_near_exact_ones_at_full_strength_and_within_black_and_white() -> None:
    recipe = SimCLR(image_size=32, batch_size=2, blur=0.5, blur_kernel=3, jitter=(0.8, 0.8, 0.8, 0.2), grayscale=0.2)
    smooth = TF.gaussian_blur(pixels(400).float(), [9, 9], [3.0, 3.0])  # as photographs are, neighbours are alike
    contrast = (smooth - smooth.mean(dim=(1, 2, 3), keepdim=True)) * 8 + 127
    exact, fast = both(recipe, contrast.clamp(0, 255).to(torch.uint8))
    spread, correlation = [], torch.corrcoef(torch.stack([exact.flatten(), fast.flatten()]))[0, 1].item()
    for view in (exact, fast):
        spread.append((view.amin(dim=(0, 2, 3)), view.amax(dim=(0, 2, 3))))
    assert correlation > 0.9
    for ends, same in zip(*spread, strict=True):
        torch.testing.assert_close(ends, same, rtol=0, atol=1e-5)
