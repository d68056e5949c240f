"""Augmentations: uint8 batches in, float views out, with random parameters of their own for each image.

Every random number of a training step is drawn here, so that a step is a pure function of its images and its
seed. The operations follow torchvision's on float tensors; the whole batch takes each one at once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision's rgb_to_grayscale


class Draws:
    """Random numbers for some rows of a global batch.

    Numbers are drawn for the whole batch and this process keeps its own rows, so that the views do not depend
    on how the batch is divided among processes or micro-batches.

    Args:
        seed: Seed of this step.
        rows: The rows of the batch to draw for.
        total: Images in the global batch.
        device: Where the numbers are drawn.
    """

    def __init__(self, seed: int, *, rows: slice, total: int, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rows = rows
        self._total = total

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform float32 numbers in [low, high), one block of `shape` for each row."""
        numbers = torch.rand(self._total, *shape, generator=self._generator, device=self.device)
        return numbers[self._rows] * (high - low) + low

    def chance(self, probability: float) -> Tensor:
        """Boolean (rows,): true with the given probability."""
        return self.uniform() < probability

    def shared(self, *shape: int) -> Tensor:
        """Uniform float32 numbers in [0, 1) of exactly `shape`, the same for every row of the batch."""
        return torch.rand(*shape, generator=self._generator, device=self.device)


def random_boxes(
    draws: Draws,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Crop boxes as torchvision's RandomResizedCrop draws them (Szegedy et al. 2015, section 6).

    Ten attempts each; an image whose attempts all exceed it takes the largest centred crop within `ratio`.

    Args:
        draws: Source of random numbers.
        height: Height of the images, pixels.
        width: Width of the images, pixels.
        scale: Range of the crop's share of the area, in (0, 1].
        ratio: Range of width / height, drawn uniformly in its logarithm.

    Returns:
        float32 (B, 4): top, left, height, width in whole pixels.
    """
    attempts = 10
    area = height * width * draws.uniform(attempts, low=scale[0], high=scale[1])
    aspect = draws.uniform(attempts, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    w = (area * aspect).sqrt().round()
    h = (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)

    limited = min(max(width / height, ratio[0]), ratio[1])
    fallback_w = float(min(width, round(height * limited)))
    fallback_h = float(min(height, round(width / limited)))
    found = fits.any(dim=1)
    w = torch.where(found, w.gather(1, first)[:, 0], fallback_w)
    h = torch.where(found, h.gather(1, first)[:, 0], fallback_h)
    top = torch.where(found, (draws.uniform() * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(found, (draws.uniform() * (width - w + 1)).floor(), ((width - w) / 2).floor())
    return torch.stack([top, left, h, w], dim=1)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def resize_weights(start: Tensor, length: Tensor, *, source: int, target: int, interpolation: str) -> Tensor:
    """Matrices that cut [start, start + length) out of a line of pixels and resize it, with antialiasing.

    Pixel centres lie at half-integers; when shrinking, the filter widens by the scale, as Pillow's and
    torchvision's antialiased resizing do; pixels outside the crop do not contribute.

    Args:
        start: (B,) first pixel of the crop.
        length: (B,) pixels in the crop.
        source: Pixels in the line.
        target: Pixels after resizing.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        float32 (B, target, source); each row sums to 1.
    """
    kernel = _FILTERS[interpolation]
    device = start.device
    scale = (length / target)[:, None, None]
    stretch = scale.clamp_min(1.0)
    centre = (torch.arange(target, device=device) + 0.5)[None, :, None] * scale
    position = torch.arange(source, device=device)[None, None, :] - start[:, None, None]
    inside = (position >= 0) & (position < length[:, None, None])
    weights = kernel((position + 0.5 - centre) / stretch) * inside
    return weights / weights.sum(dim=2, keepdim=True)


def crop_resize(images: Tensor, boxes: Tensor, flips: Tensor, *, size: int, interpolation: str = "bilinear") -> Tensor:
    """Crop, resize and flip each image by its own parameters: two batched matrix products.

    Args:
        images: uint8 (B, C, H, W).
        boxes: (B, 4) top, left, height, width, pixels.
        flips: Boolean (B,): mirror left to right.
        size: Side of the views, pixels.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        float32 (B, C, size, size) in [0, 1].
    """
    top, left, height, width = boxes.unbind(dim=1)
    batch, channels, h, w = images.shape
    down = resize_weights(top, height, source=h, target=size, interpolation=interpolation)
    across = resize_weights(left, width, source=w, target=size, interpolation=interpolation)
    across = torch.where(flips[:, None, None], across.flip(1), across).mT
    lines = images.float().flatten(0, 1) @ across.repeat_interleave(channels, dim=0)
    views = down.repeat_interleave(channels, dim=0) @ lines
    return (views / 255).clamp_(0, 1).view(batch, channels, size, size)


def grayscale(images: Tensor) -> Tensor:
    """Luminance (B, 1, H, W) of RGB images (B, 3, H, W)."""
    red, green, blue = images.unbind(dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def _luminance(images: Tensor) -> Tensor:
    return grayscale(images) if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale by `factor` (B,), clamped to [0, 1]."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luminance by `factor` (B,), clamped to [0, 1]."""
    mean = _luminance(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend RGB images with their luminance by `factor` (B,), clamped to [0, 1]."""
    return torch.lerp(grayscale(images), images, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by `shift` (B,), a share of the full circle in [-0.5, 0.5]."""
    red, green, blue = images.unbind(dim=1)
    value, low = images.amax(dim=1), images.amin(dim=1)
    chroma = value - low
    scale = 1 / torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue = hue + 6 * shift[:, None, None]  # in sixths of the circle

    def channel(offset: float) -> Tensor:
        sixth = torch.remainder(hue + offset, 6)
        return value - chroma * torch.minimum(sixth, 4 - sixth).clamp_(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


def color_jitter(
    draws: Draws, images: Tensor, strength: tuple[float, float, float, float], *, probability: float = 1.0
) -> Tensor:
    """Brightness, contrast, saturation and hue in a random order of its own for each image.

    Images without three channels have neither saturation nor hue: those two leave them alone.

    Args:
        draws: Source of random numbers.
        images: float32 (B, C, H, W) in [0, 1].
        strength: Brightness, contrast and saturation factors lie in [max(0, 1 - s), 1 + s], the hue shift in
            [-s, s].
        probability: Share of the images that are jittered at all.
    """
    chosen = draws.chance(probability)
    factors = [draws.uniform(low=max(0.0, 1 - s), high=1 + s) for s in strength[:3]]
    factors.append(draws.uniform(low=-strength[3], high=strength[3]))
    order = draws.uniform(4).argsort(dim=1)
    operations = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
    if images.shape[1] != 3:
        operations = operations[:2]
    images = images.clone()
    for turn in range(4):
        for number, operation in enumerate(operations):
            if strength[number] == 0:
                continue
            rows = torch.nonzero(chosen & (order[:, turn] == number))[:, 0]
            images[rows] = operation(images[rows], factors[number][rows])
    return images


def random_grayscale(draws: Draws, images: Tensor, probability: float) -> Tensor:
    """Replace RGB images by their luminance in three equal channels, with the given probability."""
    chosen = draws.chance(probability)[:, None, None, None]
    return torch.where(chosen, grayscale(images), images) if images.shape[1] == 3 else images


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur each image by its own Gaussian, with reflected borders, as torchvision's GaussianBlur.

    Args:
        images: float32 (B, C, H, W).
        sigma: (B,) standard deviations, pixels.
        kernel_size: Odd number of taps.
    """
    batch, channels = images.shape[:2]
    half = kernel_size // 2
    taps = torch.arange(-half, half + 1, device=images.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    lines = F.conv2d(padded.flatten(0, 1)[None], kernel[:, :, None, :], groups=batch * channels)
    return F.conv2d(lines, kernel[:, :, :, None], groups=batch * channels).view(images.shape)


def random_blur(draws: Draws, images: Tensor, *, probability: float, kernel_size: int) -> Tensor:
    """Blur with the given probability, sigma uniform in [0.1, 2.0] pixels (Chen et al. 2020, appendix A)."""
    rows = torch.nonzero(draws.chance(probability))[:, 0]
    sigma = draws.uniform(low=0.1, high=2.0)
    if len(rows) == 0:
        return images
    images = images.clone()
    images[rows] = gaussian_blur(images[rows], sigma[rows], kernel_size)
    return images
