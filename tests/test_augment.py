import math

import pytest
import torch
import torchvision.transforms.functional as TF  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from vision_ssl.augment import (
    BLOCK,
    LARGE,
    Draws,
    crop_resize,
    draw_blur,
    gaussian_blur,
    in_blocks,
    on_chosen,
    random_boxes,
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
@pytest.mark.parametrize("size", [8, 24, 40, 60, LARGE])
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


@pytest.mark.parametrize("size", [20, LARGE])
def test_whole_image_at_its_own_size_is_left_alone(size: int) -> None:
    pixels = random_pixels(2, height=size, width=size)
    boxes = torch.tensor([[0.0, 0.0, size, size]]).expand(2, 4)
    for interpolation in ("bilinear", "bicubic"):
        views = crop_resize(pixels, boxes, torch.tensor([False, True]), size=size, interpolation=interpolation)
        torch.testing.assert_close(views[0], pixels[0] / 255)
        torch.testing.assert_close(views[1], pixels[1].flip(2) / 255)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_large_crops_of_a_whole_batch_as_on_a_gpu_equal_those_of_single_images(
    monkeypatch: pytest.MonkeyPatch, interpolation: str
) -> None:
    pixels, boxes = random_pixels(30), random_boxes(draws(30), 40, 48, scale=(0.02, 1.0))
    flips = draws(30).chance(0.5)
    single = crop_resize(pixels, boxes, flips, size=LARGE, interpolation=interpolation)
    monkeypatch.setattr("vision_ssl.augment.whole_batch", lambda images: True)
    whole = crop_resize(pixels, boxes, flips, size=LARGE, interpolation=interpolation)
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-4)


# Blur


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 23])
def test_blur_equals_torchvisions(kernel_size: int) -> None:
    images, sigma = random_images(4), torch.tensor([0.1, 0.7, 1.3, 2.0])
    blurred = gaussian_blur(images, sigma, kernel_size)
    for image, own, result in zip(images, sigma.tolist(), blurred, strict=True):
        expected = TF.gaussian_blur(image, [kernel_size, kernel_size], [own, own])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_blur_is_drawn_for_each_image_within_its_range() -> None:
    chosen, sigma = draw_blur(draws(2000), 0.3)
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert (sigma.min().item(), sigma.max().item()) == pytest.approx((0.1, 2.0), abs=0.01)
    assert len(sigma.unique()) > 1000


# Parts of a batch


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_blocks_are_all_rows_once_and_fit_the_caches(batch: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    images = torch.empty(batch, 3, 64, 64)
    blocks = [torch.arange(batch)[rows] for rows in in_blocks(images)]
    assert torch.equal(torch.cat(blocks), torch.arange(batch))
    assert all(len(rows) * 3 * 64 * 64 <= threads * BLOCK for rows in blocks)


def test_an_image_larger_than_a_block_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert list(in_blocks(torch.empty(2, 3, 512, 512))) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("chosen", [[False] * 4, [True] * 4, [False, True, True, False]])
def test_only_chosen_images_change_each_by_its_own_numbers(chosen: list[bool]) -> None:
    images, factors = random_images(4), torch.tensor([2.0, 3.0, 4.0, 5.0])
    before = images.clone()
    changed = on_chosen(torch.tensor(chosen), lambda part, f: part * f[:, None, None, None], images, factors)
    for row, yes in enumerate(chosen):
        assert torch.equal(changed[row], before[row] * factors[row] if yes else before[row])
    assert torch.equal(images, before)


def test_normalise_by_hand() -> None:
    images = torch.tensor([0.5, 1.0]).reshape(1, 2, 1, 1)
    assert normalise(images, (0.1, 0.5), (0.2, 0.25)).flatten().tolist() == pytest.approx([2.0, 2.0])
