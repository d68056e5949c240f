"""Colours of a batch: jitter, whose order is drawn for each image, and grayscale, as torchvision's on float tensors.

`ColorMap` does both as one affine map of each image's colours: less exact, and in a fraction of the time.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .augment import Draws, block_rows, on_chosen, whole_batch
from .device import constant

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_NOTHING = -1  # a turn that changes nothing

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision's rgb_to_grayscale


def grayscale(images: Tensor) -> Tensor:
    """Luminance (B, 1, H, W) of RGB images (B, 3, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return torch.add(torch.add(LUMA[0] * red, green, alpha=LUMA[1]), blue, alpha=LUMA[2])


def blend(images: Tensor, factor: Tensor, operation: Tensor) -> Tensor:
    """Brightness, contrast or saturation of each image, clamped to [0, 1].

    All three go from a reference to the image, by `factor`, and beyond: from black, from the mean of the luminance,
    and from the luminance. So one computation serves a batch in which each image has its own operation.

    Args:
        images: float32 (B, C, H, W) in [0, 1].
        factor: (B,), at least 0; 1 changes nothing.
        operation: (B,), `BRIGHTNESS`, `CONTRAST` or `SATURATION`; the last needs three channels.
    """
    luminance = grayscale(images) if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)
    towards = 1 - factor
    share = towards.where(operation == SATURATION, 0.0)[:, None, None, None]
    shift = towards.where(operation == CONTRAST, 0.0)[:, None, None, None] * luminance.mean(dim=(2, 3), keepdim=True)
    return torch.addcmul(torch.addcmul(shift, luminance, share), images, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by `shift` (B,), a share of the full circle in [-0.5, 0.5]."""
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # The hue, in sixths of the circle and times chroma: 0 is red, 2 is green, 4 is blue.
    scaled_hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    hue = scaled_hue.div_(chroma.clamp_min(torch.finfo(chroma.dtype).tiny))
    # Channel c has its own hue at 2 c: far from it, it is lowest, and within 1 to 2 sixths of the opposite it rises.
    # `away` is the distance from the opposite on the circle; the hue lies in [-1, 5], the offset in [-6, 0).
    own = 2 * torch.arange(3, device=images.device)
    offset = torch.remainder(6 * shift[:, None] - own, 6) - 6
    away = (hue + offset[:, :, None, None]).abs_().sub_(3).abs_()
    return torch.addcmul(value, chroma, away.neg_().add_(2).clamp_(0, 1), value=-1)


class Jitter(NamedTuple):
    """What `color_jitter` does to each image.

    Attributes:
        factors: (B, 4) of brightness, contrast and saturation, and the shift of the hue.
        order: int64 (B, 4): `BRIGHTNESS`, `CONTRAST`, `SATURATION` or `HUE` in each turn; -1 for nothing.
    """

    factors: Tensor
    order: Tensor

    @classmethod
    def draw(
        cls, draws: Draws, strength: tuple[float, float, float, float], *, probability: float, channels: int
    ) -> "Jitter":
        """Draw factors, and a random order for each image.

        Images without three channels have neither saturation nor hue: those two leave them alone.

        Args:
            draws: Source of random numbers.
            strength: Brightness, contrast and saturation factors lie in [max(0, 1 - s), 1 + s], the hue shift in
                [-s, s].
            probability: Share of the images that are jittered at all.
            channels: Of the images.
        """
        chosen = draws.chance(probability)
        factors = [draws.uniform(low=max(0.0, 1 - s), high=1 + s) for s in strength[:3]]
        factors.append(draws.uniform(low=-strength[3], high=strength[3]))
        order = draws.uniform(4).argsort(dim=1)
        for number in range(4):
            if strength[number] == 0 or (number in (SATURATION, HUE) and channels != 3):
                order = order.where(order != number, _NOTHING)
        return cls(torch.stack(factors, dim=1), order.where(chosen[:, None], _NOTHING))

    def rows(self, rows: Tensor | slice) -> "Jitter":
        """That of the images at `rows`."""
        return Jitter(self.factors[rows], self.order[rows])

    def blocks(self, images: Tensor) -> Iterator[Tensor | slice]:
        """The rows of `images` in blocks to work on; in a block of a CPU, all images turn their hue at one time."""
        if whole_batch(images):
            yield slice(None)
            return
        turns = torch.arange(1, 5)
        when = torch.where(self.order == HUE, turns, 0).sum(dim=1) - (self.order == _NOTHING).all(dim=1).int()
        for turn in when.unique():
            yield from (when == turn).nonzero()[:, 0].split(block_rows(images))


def color_jitter(images: Tensor, jitter: Jitter) -> Tensor:
    """Brightness, contrast, saturation and hue of float32 images (B, C, H, W) in [0, 1], in each image's own order."""
    for operation in jitter.order.unbind(dim=1):
        factor = jitter.factors.gather(1, operation.clamp_min(0)[:, None])[:, 0]
        images = on_chosen((operation >= 0) & (operation < HUE), blend, images, factor, operation)
        if images.shape[1] == 3:
            images = on_chosen(operation == HUE, adjust_hue, images, factor)
    return images


def random_grayscale(images: Tensor, chosen: Tensor) -> Tensor:
    """Replace RGB images by their luminance in three equal channels where `chosen` (B,); leave others alone."""
    return on_chosen(chosen, _gray, images) if images.shape[1] == 3 else images


def _gray(images: Tensor) -> Tensor:
    return grayscale(images).expand(-1, 3, -1, -1)


class ColorMap(NamedTuple):
    """An affine map of the colours of each image: `matrix @ colour + of_mean @ mean colour of the image`.

    Attributes:
        matrix: (B, C, C).
        of_mean: (B, C, C); contrast departs from the mean.
    """

    matrix: Tensor
    of_mean: Tensor

    @classmethod
    def of(cls, jitter: Jitter, gray: Tensor, channels: int) -> "ColorMap":
        """Jitter, then grayscale where `gray` (B,), as they are but for two liberties.

        Values are not clamped between the steps, and the hue turns around the grey axis of the RGB cube, along
        which HSV looks at it.

        Args:
            jitter: What to do to each image.
            gray: Which images lose their colour in the end.
            channels: Of the images.
        """
        device = gray.device
        identity = torch.eye(channels, device=device)
        luminance = constant(LUMA if channels == 3 else (1 / channels,) * channels, device).expand(channels, -1)
        matrix, of_mean = identity.expand(len(gray), -1, -1), identity.new_zeros(len(gray), channels, channels)
        for operation in jitter.order.unbind(dim=1):
            factor = jitter.factors.gather(1, operation.clamp_min(0)[:, None])[:, :, None]
            kind, towards = operation[:, None, None], 1 - factor
            step = factor * identity + towards.where(kind == SATURATION, 0.0) * luminance
            if channels == 3:
                step = torch.where(kind == HUE, _turn(2 * math.pi * factor), step)
            step = step.where(kind != _NOTHING, identity)
            shift = towards.where(kind == CONTRAST, 0.0) * luminance @ (matrix + of_mean)
            matrix, of_mean = step @ matrix, step @ of_mean + shift
        if channels == 3:
            last = luminance.where(gray[:, None, None], identity)
            matrix, of_mean = last @ matrix, last @ of_mean
        return cls(matrix, of_mean)

    def rows(self, rows: slice) -> "ColorMap":
        """That of the images at `rows`."""
        return ColorMap(self.matrix[rows], self.of_mean[rows])


def _turn(angle: Tensor) -> Tensor:
    """Rotations (B, 3, 3) by `angle` (B, 1, 1) around (1, 1, 1), from red to green to blue (Rodrigues' formula)."""
    identity = torch.eye(3, device=angle.device)
    across = identity.roll(1, dims=0) - identity.roll(-1, dims=0)  # the cross product with (1, 1, 1)
    return angle.cos() * identity + (1 - angle.cos()) / 3 + angle.sin() / math.sqrt(3) * across
