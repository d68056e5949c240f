"""Augmentations: uint8 batches in, float views out, with random parameters of their own for each image.

Every random number of a training step is drawn here, so that a step is a pure function of its images and its
seed. The operations follow torchvision's on float tensors; the whole batch takes each one at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 18  # numbers of a block for each thread of a CPU: a megabyte, so that all steps on it stay in its cache
LARGE = 128  # side of views, pixels, from which on a CPU is faster image by image than by products of matrices

# Numbers for each image that are drawn together: to draw each few when they are needed costs a GPU a kernel for each,
# and could not be compiled.
AT_ONCE = 512  # enough for two views, or for one and the mask of 400 patches


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
        self._numbers = torch.rand(total, AT_ONCE, generator=self._generator, device=device)[rows]
        self._used = 0

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform float32 numbers in [low, high), one block of `shape` for each row."""
        start, end = self._used, self._used + math.prod(shape)
        if end > AT_ONCE:
            numbers = torch.rand(self._total, *shape, generator=self._generator, device=self.device)[self._rows]
        else:
            self._used = end
            numbers = self._numbers[:, start:end].reshape(-1, *shape)
        return numbers * (high - low) + low

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
    return x.abs_().neg_().add_(1).clamp_min_(0)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs_()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def resize_weights(
    start: Tensor, length: Tensor, mirrored: Tensor, *, source: int, target: int, interpolation: str
) -> Tensor:
    """Matrices that cut [start, start + length) out of a line of pixels and resize it, with antialiasing.

    Pixel centres lie at half-integers; when shrinking, the filter widens by the scale, as Pillow's and
    torchvision's antialiased resizing do; pixels outside the crop do not contribute.

    Args:
        start: (B,) first pixel of the crop.
        length: (B,) pixels in the crop.
        mirrored: Boolean (B,): from the crop's end to its start.
        source: Pixels in the line.
        target: Pixels after resizing.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        float32 (B, target, source); each row sums to 1.
    """
    start, length, mirrored = start[:, None], length[:, None], mirrored[:, None]
    scale = length / target
    stretch = scale.clamp_min(1.0)
    centre = (torch.arange(target, device=start.device) + 0.5) * scale
    centre = torch.where(mirrored, length - centre, centre)
    position = torch.arange(source, device=start.device) + 0.5 - start
    # Infinitely far from every centre: no kernel reaches what is outside the crop.
    position = position.where((position > 0) & (position < length), float("inf"))
    weights = _FILTERS[interpolation]((position / stretch)[:, None] - (centre / stretch)[:, :, None])
    return weights.mul_(1 / weights.sum(dim=2, keepdim=True))


def crop_resize(images: Tensor, boxes: Tensor, flips: Tensor, *, size: int, interpolation: str = "bilinear") -> Tensor:
    """Crop, resize and flip each image by its own parameters: two batched matrix products, or image by image.

    Args:
        images: uint8 (B, C, H, W).
        boxes: (B, 4) top, left, height, width, pixels.
        flips: Boolean (B,): mirror left to right.
        size: Side of the views, pixels.
        interpolation: `bilinear` or `bicubic`.

    Returns:
        float32 (B, C, size, size) in [0, 1].
    """
    if one_by_one(images, size):
        return _crop_resize_each(images, boxes, flips, size, interpolation)
    down, across = crop_weights(boxes, flips, images.shape[2:], size=size, interpolation=interpolation)
    return separable(images.float(), down, across).clamp_(0, 1)


def one_by_one(images: Tensor, size: int) -> bool:
    """Whether crops of this size are made image by image, by torch's own interpolation.

    Matrices of this size are mostly zero, and cost more than they save.
    """
    return size >= LARGE and not whole_batch(images)


def _crop_resize_each(images: Tensor, boxes: Tensor, flips: Tensor, size: int, interpolation: str) -> Tensor:
    views = torch.empty(*images.shape[:2], size, size)
    for view, image, box, flip in zip(views, images, boxes.int().tolist(), flips.tolist(), strict=True):
        top, left, height, width = box
        window = image[None, :, top : top + height, left : left + width].float()
        resized = F.interpolate(window, (size, size), mode=interpolation, antialias=True)[0]
        torch.mul(resized.flip(2) if flip else resized, 1 / 255, out=view)
    return views.clamp_(0, 1)


def crop_weights(
    boxes: Tensor, flips: Tensor, shape: Sequence[int], *, size: int, interpolation: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Matrices (B, size, H) along the columns and (B, size, W) along the rows of images with 255 for white."""
    top, left, height, width = boxes.unbind(dim=1)
    down = resize_weights(
        top, height, torch.zeros_like(flips), source=shape[0], target=size, interpolation=interpolation
    )
    across = resize_weights(left, width, flips, source=shape[1], target=size, interpolation=interpolation)
    return down.div_(255), across


def separable(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Multiply each image of (B, C, H, W) by its own matrices, (B, S, H) along columns and (B, S, W) along rows."""
    planes = images.new_empty(images.shape[1], *down.shape[:2], across.shape[1])
    for channel, plane in zip(images.unbind(dim=1), planes, strict=True):
        # A product for all channels at once would first copy the matrices, once for each of them.
        torch.bmm(down, channel @ across.mT, out=plane)
    return planes.transpose(0, 1)


def whole_batch(images: Tensor) -> bool:
    """Whether an operation takes the batch whole: to choose rows of it, a GPU would have to stop and answer.

    A CPU works on blocks of rows, and on nothing but the rows that change.
    """
    return images.device.type != "cpu"


def block_rows(images: Tensor) -> int:
    """How many images (B, C, H, W) to work on at a time: on a CPU, those that stay in its cache from step to step."""
    return len(images) if whole_batch(images) else max(1, torch.get_num_threads() * BLOCK // images[0].numel())


def in_blocks(images: Tensor) -> Iterator[slice]:
    """The rows of a batch (B, C, H, W) in parts of `block_rows`."""
    step = block_rows(images)
    for start in range(0, len(images), step):
        yield slice(start, start + step)


def on_chosen(chosen: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """`operation(images, *parameters)` where `chosen` (B,), and the same images elsewhere; see `whole_batch`.

    Images or other tensors (B, ...): what counts is the first dimension.
    """
    if whole_batch(images):
        every = chosen.view(-1, *[1] * (images.ndim - 1))
        return torch.where(every, operation(images, *parameters), images)
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return operation(images, *parameters)
    return images.index_copy(0, rows, operation(images[rows], *(numbers[rows] for numbers in parameters)))


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur each image by its own Gaussian, with reflected borders, as torchvision's GaussianBlur.

    Args:
        images: float32 (B, C, H, W).
        sigma: (B,) standard deviations, pixels.
        kernel_size: Odd number of taps.
    """
    down, across = (blur_weights(sigma, side, kernel_size) for side in images.shape[2:])
    return separable(images, down, across)


def blur_weights(sigma: Tensor, side: int, kernel_size: int) -> Tensor:
    """Matrices (B, side, side) that blur a line of pixels with reflected borders."""
    half = kernel_size // 2
    taps = torch.arange(-half, half + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = kernel.where(kernel > 1e-20, 0.0)  # denormal numbers would take a CPU many times as long
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    at = (torch.arange(side, device=sigma.device)[:, None] + taps).abs()  # reflected at 0
    at = side - 1 - (side - 1 - at).abs()  # and at the other end
    weights = kernel.new_zeros(len(sigma), side, side)
    return weights.scatter_add_(2, at.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, side, -1))


def draw_blur(draws: Draws, probability: float) -> tuple[Tensor, Tensor]:
    """Which images to blur (B,), and sigma (B,) in [0.1, 2.0] pixels (Chen et al. 2020, appendix A)."""
    return draws.chance(probability), draws.uniform(low=0.1, high=2.0)
