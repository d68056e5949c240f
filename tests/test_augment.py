import math
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from vision_ssl.augment import (
    Draws,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    crop_resize,
    gaussian_blur,
    grayscale,
    random_blur,
    random_boxes,
    random_grayscale,
)
from vision_ssl.data import normalise

CPU = torch.device("cpu")


def draws(total: int, seed: int = 0, rows: slice = slice(None)) -> Draws:
    return Draws(seed, rows=rows, total=total, device=CPU)


def random_images(batch: int, channels: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def random_pixels(batch: int, channels: int = 3, height: int = 40, width: int = 48) -> Tensor:
    shape = (batch, channels, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# Draws


def test_rows_of_a_batch_are_drawn_alike_however_it_is_divided() -> None:
    def numbers(rows: slice) -> list[Tensor]:
        mine = draws(6, rows=rows)
        return [mine.uniform(), mine.chance(0.5), mine.uniform(2, 3, low=-1, high=4)]

    whole = numbers(slice(0, 6))
    for part in (slice(0, 2), slice(2, 6), slice(5, 6)):
        for own, all_rows in zip(numbers(part), whole, strict=True):
            assert torch.equal(own, all_rows[part])


def test_shared_numbers_are_the_same_for_all_rows_and_disturb_none() -> None:
    def numbers(rows: slice) -> tuple[Tensor, Tensor]:
        mine = draws(4, rows=rows)
        return mine.shared(5, 2), mine.uniform()

    (shared, after), (shared_again, after_again) = numbers(slice(0, 4)), numbers(slice(2, 4))
    assert shared.shape == (5, 2)
    assert torch.equal(shared, shared_again)
    assert torch.equal(after[2:], after_again)


def test_seeds_give_other_numbers_and_a_seed_the_same() -> None:
    assert torch.equal(draws(8, seed=3).uniform(), draws(8, seed=3).uniform())
    assert not torch.equal(draws(8, seed=3).uniform(), draws(8, seed=4).uniform())
    again = draws(8)
    assert not torch.equal(again.uniform(), again.uniform())


def test_uniform_fills_its_range_and_chance_keeps_its_word() -> None:
    numbers = draws(20_000).uniform(low=-2, high=6)
    assert numbers.min() >= -2
    assert numbers.max() <= 6
    assert numbers.mean().item() == pytest.approx(2, abs=0.1)
    assert numbers.std().item() == pytest.approx(8 / math.sqrt(12), abs=0.1)
    assert draws(20_000).chance(0.3).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not draws(1000).chance(0.0).any()
    assert draws(1000).chance(1.0).all()


# Crops


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.5, 0.6)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    count = 3000
    ours = random_boxes(draws(count), height, width, scale=scale)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    pairs = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = torch.tensor(pairs, dtype=torch.float32)
    assert ours.shape == (count, 4)
    assert torch.equal(ours, ours.round())

    def statistics(boxes: Tensor) -> Tensor:
        top, left, h, w = boxes.unbind(1)
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + h <= height).all()
        assert (left + w <= width).all()
        slack = [top / (height - h).clamp_min(1), left / (width - w).clamp_min(1)]
        return torch.stack([h * w / (height * width), (w / h).log(), h, w, *slack], dim=1)

    a, b = statistics(ours), statistics(theirs)
    error = ((a.var(0) + b.var(0)) / count).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()
    assert torch.allclose(a.std(0), b.std(0), rtol=0.1)


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10), (60, 60), (48, 64), (1, 50), (7, 1)])
def test_boxes_that_fit_in_no_attempt_are_torchvisions_centred_ones(height: int, width: int) -> None:
    boxes = random_boxes(draws(50), height, width, scale=(1.0, 1.0), ratio=(0.9, 1.1))
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [0.9, 1.1])
    assert boxes.unique(dim=0).tolist() == [list(expected)]


def test_boxes_are_drawn_for_each_image() -> None:
    boxes = random_boxes(draws(30), 64, 64, scale=(0.2, 1.0))
    assert len(boxes.unique(dim=0)) == 30


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [8, 24, 40, 60])
def test_crops_equal_torchvisions(size: int, interpolation: str) -> None:
    pixels = random_pixels(40)
    boxes = random_boxes(draws(40), 40, 48, scale=(0.02, 1.0))
    boxes[0] = torch.tensor([0, 0, 40, 48])
    boxes[1] = torch.tensor([39, 47, 1, 1])
    boxes[2] = torch.tensor([3, 5, 2, 30])
    flips = torch.arange(40) % 2 == 0
    views = crop_resize(pixels, boxes, flips, size=size, interpolation=interpolation)
    for view, image, box, flip in zip(views, pixels / 255, boxes.int().tolist(), flips, strict=True):
        mode = InterpolationMode(interpolation)
        expected = TF.resized_crop(image, *box, [size, size], mode, antialias=True)
        expected = TF.hflip(expected) if flip else expected
        torch.testing.assert_close(view, expected.clamp(0, 1), rtol=0, atol=0.5 / 255)


def test_whole_image_at_its_own_size_is_left_alone() -> None:
    pixels = random_pixels(2, height=20, width=20)
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0]]).expand(2, 4)
    for interpolation in ("bilinear", "bicubic"):
        views = crop_resize(pixels, boxes, torch.tensor([False, True]), size=20, interpolation=interpolation)
        torch.testing.assert_close(views[0], pixels[0] / 255)
        torch.testing.assert_close(views[1], pixels[1].flip(2) / 255)


# Colours

FACTORS = torch.tensor([0.0, 0.4, 1.0, 1.3, 2.0])


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (adjust_brightness, TF.adjust_brightness, FACTORS),
        (adjust_contrast, TF.adjust_contrast, FACTORS),
        (adjust_saturation, TF.adjust_saturation, FACTORS),
        (adjust_hue, TF.adjust_hue, torch.tensor([-0.5, -0.1, 0.0, 0.2, 0.5])),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_colours_change_as_in_torchvision(ours: Any, theirs: Any, factors: Tensor) -> None:
    images = random_images(5)
    images[:, :, 0, 0] = 0.3  # grey has no hue
    images[:, :, 0, 1], images[:, :, 0, 2] = 0.0, 1.0
    images[:, 0, 0, 3] = images[:, 1, 0, 3] = 0.9  # two channels share the largest value
    images[:, 1, 0, 4] = images[:, 2, 0, 4] = 0.9
    before = images.clone()
    changed = ours(images, factors)
    for image, factor, result in zip(images, factors.tolist(), changed, strict=True):
        torch.testing.assert_close(result, theirs(image, factor), rtol=0, atol=2e-5)
    assert torch.equal(images, before)


def test_grayscale_equals_torchvisions() -> None:
    images = random_images(2)
    torch.testing.assert_close(grayscale(images), TF.rgb_to_grayscale(images))


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 23])
def test_blur_equals_torchvisions(kernel_size: int) -> None:
    images, sigma = random_images(4), torch.tensor([0.1, 0.7, 1.3, 2.0])
    blurred = gaussian_blur(images, sigma, kernel_size)
    for image, own, result in zip(images, sigma.tolist(), blurred, strict=True):
        expected = TF.gaussian_blur(image, [kernel_size, kernel_size], [own, own])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_jitter_takes_torchvisions_steps_in_the_order_drawn_for_each_image() -> None:
    images, strength = random_images(24), (0.8, 0.6, 0.9, 0.3)
    jittered = color_jitter(draws(24), images, strength, probability=0.7)

    again = draws(24)
    chosen = again.chance(0.7)
    factors = [again.uniform(low=1 - s, high=1 + s) for s in strength[:3]]
    factors.append(again.uniform(low=-strength[3], high=strength[3]))
    orders = again.uniform(4).argsort(dim=1)
    assert len(orders.unique(dim=0)) > 10
    steps: list[Any] = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for row, image in enumerate(images):
        expected = image
        for number in orders[row].tolist() if chosen[row] else []:
            expected = steps[number](expected, factors[number][row].item())
        torch.testing.assert_close(jittered[row], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("strength", "low", "high"), [(0.4, 0.3, 0.7), (2.0, 0.0, 1.0)])
def test_jitter_factors_lie_around_one_and_never_below_zero(strength: float, low: float, high: float) -> None:
    grey = torch.full((2000, 1, 1, 1), 0.5)
    values = color_jitter(draws(2000), grey, (strength, 0.0, 0.0, 0.0))
    assert values.min().item() == pytest.approx(low, abs=0.01)
    assert values.max().item() == pytest.approx(high, abs=0.01)
    assert (values == 0).float().mean() < 0.01  # where negative factors would end


def everything(own: Draws, images: Tensor, probability: float) -> Tensor:
    images = color_jitter(own, images, (0.4, 0.4, 0.4, 0.1), probability=probability)
    images = random_grayscale(own, images, probability)
    return random_blur(own, images, probability=probability, kernel_size=5)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_channels_and_any_batch_stay_in_range(batch: int, channels: int) -> None:
    images = random_images(batch, channels)
    images[0, :, :4] = images[0, :, :4].round()  # the ends of the range
    before = images.clone()
    changed = everything(draws(batch), images, probability=1.0)
    assert changed.shape == images.shape
    assert changed.dtype == torch.float32
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-6
    assert not torch.allclose(changed, images, atol=1e-3)
    assert torch.equal(images, before)


def test_probability_zero_changes_nothing() -> None:
    images = random_images(8)
    assert torch.equal(everything(draws(8), images, probability=0.0), images)


@pytest.mark.parametrize("operation", ["jitter", "grayscale", "blur"])
def test_probability_one_changes_every_image_and_one_half_some(operation: str) -> None:
    images = random_images(64)

    def changed(probability: float) -> float:
        own = draws(64)
        if operation == "jitter":
            result = color_jitter(own, images, (0.4, 0.4, 0.4, 0.1), probability=probability)
        elif operation == "grayscale":
            result = random_grayscale(own, images, probability)
        else:
            result = random_blur(own, images, probability=probability, kernel_size=5)
        return (result != images).flatten(1).any(dim=1).float().mean().item()

    assert changed(1.0) > 0.9  # the weakest blurs change nothing
    assert 0.2 < changed(0.5) < 0.8


def test_gray_views_have_three_equal_channels() -> None:
    images = random_images(4)
    gray = random_grayscale(draws(4), images, 1.0)
    torch.testing.assert_close(gray, grayscale(images).expand(-1, 3, -1, -1))


def test_blur_is_drawn_for_each_image_within_its_range() -> None:
    point = torch.zeros(200, 1, 9, 9)
    point[:, 0, 4, 4] = 1
    centres = random_blur(draws(200), point, probability=1.0, kernel_size=5)[:, 0, 4, 4]
    sharpest = gaussian_blur(point[:1], torch.tensor([0.1]), 5)[0, 0, 4, 4]
    softest = gaussian_blur(point[:1], torch.tensor([2.0]), 5)[0, 0, 4, 4]
    assert softest <= centres.min() < softest * 1.1
    assert 0.9 * sharpest < centres.max() <= sharpest
    assert len(centres.unique()) > 100


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    images = random_images(6)
    others = images.clone()
    others[[0, 2, 4]] = 1 - others[[0, 2, 4]]
    first, second = (everything(draws(6), batch, probability=0.7) for batch in (images, others))
    torch.testing.assert_close(first[[1, 3, 5]], second[[1, 3, 5]])


def test_equal_images_become_different_views() -> None:
    images = random_images(1).expand(16, -1, -1, -1)
    changed = everything(draws(16), images, probability=1.0)
    assert len(changed.flatten(1).unique(dim=0)) == 16


def test_normalise_by_hand() -> None:
    images = torch.tensor([0.5, 1.0]).reshape(1, 2, 1, 1)
    assert normalise(images, (0.1, 0.5), (0.2, 0.25)).flatten().tolist() == pytest.approx([2.0, 2.0])
