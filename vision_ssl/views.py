"""SimCLR's views (Chen et al. 2020, appendix A), by torchvision's arithmetic or by less."""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .augment import (
    Draws,
    blur_weights,
    crop_resize,
    crop_weights,
    draw_blur,
    gaussian_blur,
    in_blocks,
    on_chosen,
    one_by_one,
    random_boxes,
    separable,
)
from .color import ColorMap, Jitter, color_jitter, random_grayscale
from .data import channel_statistics, normalise
from .device import constant

if TYPE_CHECKING:
    from .recipes import SimCLR


def two_views(recipe: "SimCLR", images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Two independent views of each image.

    Args:
        recipe: The strengths of the augmentations.
        images: uint8 (B, C, H, W).
        draws: Source of random numbers.

    Returns:
        Two normalised float32 batches (B, C, S, S).
    """
    view = fast_view if recipe.fast_views else exact_view
    first, second = (view(recipe, images, Choices.draw(recipe, images, draws)) for _ in range(2))
    return first, second


class Choices(NamedTuple):
    """What a view does to each image.

    Attributes:
        boxes: (B, 4) crops, as of `random_boxes`.
        flips: Boolean (B,): mirrored.
        jitter: Changes of the colours.
        gray: Boolean (B,): without colour.
        blurred: Boolean (B,).
        sigma: (B,) of the blur, pixels of the view.
    """

    boxes: Tensor
    flips: Tensor
    jitter: Jitter
    gray: Tensor
    blurred: Tensor
    sigma: Tensor

    @classmethod
    def draw(cls, recipe: "SimCLR", images: Tensor, draws: Draws) -> "Choices":
        """Draw them for images (B, C, H, W)."""
        channels, height, width = images.shape[1:]
        return cls(
            random_boxes(draws, height, width, scale=recipe.crop_scale),
            draws.chance(recipe.flip),
            Jitter.draw(draws, recipe.jitter, probability=recipe.jitter_probability, channels=channels),
            draws.chance(recipe.grayscale),
            *draw_blur(draws, recipe.blur),
        )


def exact_view(recipe: "SimCLR", images: Tensor, choices: Choices) -> Tensor:
    """A view whose every step is torchvision's: (B, C, S, S) of images (B, C, H, W)."""
    boxes, flips, jitter, gray, blurred, sigma = choices
    blur = partial(gaussian_blur, kernel_size=blur_taps(recipe))
    view = _empty_view(recipe, images)
    for rows in jitter.blocks(view):
        part = crop_resize(images[rows], boxes[rows], flips[rows], size=view_side(recipe))
        part = color_jitter(part, jitter.rows(rows))
        part = random_grayscale(part, gray[rows])
        part = on_chosen(blurred[rows], blur, part, sigma[rows])
        view[rows] = normalise(part, *channel_statistics(recipe.channels))
    return view


def fast_view(recipe: "SimCLR", images: Tensor, choices: Choices) -> Tensor:
    """A view with the blur as part of the crop, and one affine map for all that happens to the colours.

    Blur and colours may change places, since neither the one nor the other has a clamp; see `ColorMap.of` for what
    else differs from `exact_view`.
    """
    boxes, flips, jitter, gray, blurred, sigma = choices
    mean, std = channel_statistics(recipe.channels)

    colors = ColorMap.of(jitter, gray, recipe.channels)
    scale, shift = constant(std, images.device)[:, None], constant(mean, images.device)[:, None]
    view = _empty_view(recipe, images)
    for rows in in_blocks(view):
        chosen = (choice[rows] for choice in (boxes, flips, blurred, sigma))
        crops = _blurred_crops(recipe, images[rows], *chosen).flatten(2)
        matrix, of_mean = colors.rows(rows)
        offset = of_mean @ crops.mean(dim=2, keepdim=True) - shift
        part = view[rows].flatten(2)
        torch.baddbmm(offset / scale, matrix / scale, crops, out=part)
        for channel in range(recipe.channels):
            part[:, channel].clamp_(-mean[channel] / std[channel], (1 - mean[channel]) / std[channel])  # black, white
    return view


def _blurred_crops(
    recipe: "SimCLR", images: Tensor, boxes: Tensor, flips: Tensor, blurred: Tensor, sigma: Tensor
) -> Tensor:
    """Crops (B, C, S, S), of which some are blurred: by the same matrices, where there are any."""
    size = view_side(recipe)
    if one_by_one(images, size):
        blur = partial(gaussian_blur, kernel_size=blur_taps(recipe))
        return on_chosen(blurred, blur, crop_resize(images, boxes, flips, size=size), sigma)

    def with_blur(weights: Tensor, sigma: Tensor) -> Tensor:
        return blur_weights(sigma, size, blur_taps(recipe)) @ weights

    crop = crop_weights(boxes, flips, images.shape[2:], size=size)
    return separable(images.float(), *(on_chosen(blurred, with_blur, weights, sigma) for weights in crop))


def view_side(recipe: "SimCLR") -> int:
    """Side of the views, pixels: `view_size`, or that of the images."""
    return recipe.view_size or recipe.image_size


def blur_taps(recipe: "SimCLR") -> int:
    """Taps of the blur: `blur_kernel`, or a tenth of the view's side, odd."""
    return recipe.blur_kernel or view_side(recipe) // 20 * 2 + 1


def _empty_view(recipe: "SimCLR", images: Tensor) -> Tensor:
    size = view_side(recipe)
    return torch.empty(*images.shape[:2], size, size, device=images.device)
