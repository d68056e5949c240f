from functools import partial
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as TF  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor

from vision_ssl.augment import Draws, draw_blur, gaussian_blur, on_chosen
from vision_ssl.color import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Jitter,
    adjust_hue,
    blend,
    color_jitter,
    grayscale,
    random_grayscale,
)

STEPS: list[Any] = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def draws(total: int) -> Draws:
    return Draws(0, rows=slice(None), total=total, device=torch.device("cpu"))


def random_images(batch: int, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, 16, 16, generator=torch.Generator().manual_seed(1))


FACTORS = torch.tensor([0.0, 0.4, 1.0, 1.3, 2.0])


def blended(operation: int) -> Any:
    return lambda images, factors: blend(images, factors, torch.full((len(images),), operation))


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (blended(BRIGHTNESS), TF.adjust_brightness, FACTORS),
        (blended(CONTRAST), TF.adjust_contrast, FACTORS),
        (blended(SATURATION), TF.adjust_saturation, FACTORS),
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


def test_jitter_takes_torchvisions_steps_in_the_order_drawn_for_each_image() -> None:
    images, strength = random_images(24), (0.8, 0.6, 0.9, 0.3)
    jittered = color_jitter(images, Jitter.draw(draws(24), strength, probability=0.7, channels=3))

    again = draws(24)
    chosen = again.chance(0.7)
    factors = [again.uniform(low=1 - s, high=1 + s) for s in strength[:3]]
    factors.append(again.uniform(low=-strength[3], high=strength[3]))
    orders = again.uniform(4).argsort(dim=1)
    assert len(orders.unique(dim=0)) > 10
    for row, image in enumerate(images):
        expected = image
        for number in orders[row].tolist() if chosen[row] else []:
            expected = STEPS[number](expected, factors[number][row].item())
        torch.testing.assert_close(jittered[row], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("strength", "low", "high"), [(0.4, 0.3, 0.7), (2.0, 0.0, 1.0)])
def test_jitter_factors_lie_around_one_and_never_below_zero(strength: float, low: float, high: float) -> None:
    grey = torch.full((2000, 1, 1, 1), 0.5)
    jitter = Jitter.draw(draws(2000), (strength, 0.0, 0.0, 0.0), probability=1.0, channels=1)
    values = color_jitter(grey, jitter)
    assert values.min().item() == pytest.approx(low, abs=0.01)
    assert values.max().item() == pytest.approx(high, abs=0.01)
    assert (values == 0).float().mean() < 0.01  # where negative factors would end


@pytest.mark.parametrize("strength", [(0.4, 0.4, 0.4, 0.1), (0.4, 0.0, 0.0, 0.0), (0.4, 0.4, 0.4, 0.0)])
def test_jitter_in_blocks_equals_jitter_of_the_batch(strength: tuple[float, float, float, float]) -> None:
    images = torch.rand(200, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    jitter = Jitter.draw(draws(200), strength, probability=0.8, channels=3)
    blocks = [torch.arange(200)[rows] for rows in jitter.blocks(images)]
    assert torch.equal(torch.cat(blocks).sort().values, torch.arange(200))
    if strength[3]:
        for rows in blocks:
            assert len((jitter.order[rows] == HUE).unique(dim=0)) == 1
    whole = color_jitter(images, jitter)
    for rows in blocks:
        torch.testing.assert_close(color_jitter(images[rows], jitter.rows(rows)), whole[rows], rtol=0, atol=1e-6)


def jittered(own: Draws, images: Tensor, probability: float) -> Tensor:
    jitter = Jitter.draw(own, (0.4, 0.4, 0.4, 0.1), probability=probability, channels=images.shape[1])
    return color_jitter(images, jitter)


def blurred(own: Draws, images: Tensor, probability: float) -> Tensor:
    chosen, sigma = draw_blur(own, probability)
    return on_chosen(chosen, partial(gaussian_blur, kernel_size=5), images, sigma)


def everything(own: Draws, images: Tensor, probability: float) -> Tensor:
    images = jittered(own, images, probability)
    images = random_grayscale(images, own.chance(probability))
    return blurred(own, images, probability)


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
            result = jittered(own, images, probability)
        elif operation == "grayscale":
            result = random_grayscale(images, own.chance(probability))
        else:
            result = blurred(own, images, probability)
        return (result != images).flatten(1).any(dim=1).float().mean().item()

    assert changed(1.0) > 0.9  # the weakest blurs change nothing
    assert 0.2 < changed(0.5) < 0.8


def test_gray_views_have_three_equal_channels() -> None:
    images = random_images(4)
    gray = random_grayscale(images, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(gray, grayscale(images).expand(-1, 3, -1, -1))


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
