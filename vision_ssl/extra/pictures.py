"""Tensors as pictures that are part of a page."""

import base64
import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .html import Markup, tag

LARGEST = 96  # side of a picture, pixels: more is not seen at the size at which it is shown
ACCENT = (0, 114, 178)  # blue that stands out on white as on black
# Five stops of the colour map viridis, which colour-blind readers can follow, and whose lightness rises evenly.
_GRADIENT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def picture(pixels: Tensor, alt: str) -> Markup:
    """An image as an `img` element.

    Args:
        pixels: uint8 (C, H, W), or float (C, H, W) in 0..1, where what lies outside is clipped. Of other numbers of
            channels than 3, the first stands for all.
        alt: What it shows, for those who do not see it.
    """
    if pixels.is_floating_point():
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    if len(pixels) != 3 or (pixels == pixels[:1]).all():  # a gray picture takes a third of the space
        image = Image.fromarray(pixels[0].contiguous().numpy())
    else:
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return _element(image, alt)


def heat_map(shares: Tensor, alt: str) -> Markup:
    """A matrix as an `img` element: each cell in one blue, the more opaque the larger its value.

    Args:
        shares: (h, w) in 0..1; shown by their square root, so that small ones are seen.
        alt: What it shows, for those who do not see it.
    """
    opacity = (shares.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    solid = torch.tensor(ACCENT, dtype=torch.uint8).expand(*opacity.shape, 3)
    return _element(Image.fromarray(torch.cat([solid, opacity[:, :, None]], dim=2).numpy()), alt)


def strength(values: Tensor, size: int) -> Tensor:
    """A small map as a picture, dark violet where it is lowest, over green, to yellow where it is highest.

    Args:
        values: (h, w).
        size: Side of the picture, pixels.

    Returns:
        float32 (3, size, size) in 0..1.
    """
    spread = values - values.min()
    position = enlarged((spread / spread.max().clamp(min=1e-12))[None], size)[0] * (len(_GRADIENT) - 1)
    below = position.long().clamp(max=len(_GRADIENT) - 2)
    stops = torch.tensor(_GRADIENT) / 255
    return torch.lerp(stops[below], stops[below + 1], (position - below)[:, :, None]).permute(2, 0, 1)


def enlarged(image: Tensor, size: int) -> Tensor:
    """Resize (C, h, w) to (C, size, size), smoothly, and keep it in 0..1."""
    return F.interpolate(image[None].float(), size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def _element(image: Image.Image, alt: str) -> Markup:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return tag("img", src=f"data:image/png;base64,{data}", alt=alt, width=image.width, height=image.height)
