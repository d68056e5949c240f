"""Decoding: any image that Pillow opens becomes a square of uint8 pixels, always in the same way."""

import io
import os
import re
import threading
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError, features

from .errors import DataError

try:
    import simplejpeg
except ImportError:  # an extra: without it, Pillow gives the same pixels later
    simplejpeg = None

Pixels = npt.NDArray[np.uint8]

# Part of every cache key: raise it whenever the same file would give other pixels.
DECODER_VERSION = 1

# Above this many pixels a JPEG is read at a reduced scale, and one image is decoded at a time, so that memory
# stays at what one image needs. Pillow itself refuses images above 178,956,970 pixels.
LARGE_PIXELS = 1 << 24
_one_large_image = threading.Lock()

# Pillow and simplejpeg then decode by the same library, and agree to the bit; Pillow may be built with another one.
_SAME_LIBRARY = bool(features.check_feature("libjpeg_turbo"))

_FIRST_READ = 1 << 16  # bytes: most small pictures whole

# What most JPEG files start with, and any marker but those of a baseline JPEG that needs no further look: colour
# transforms, EXIF, progressive scans. No coded data hides or feigns a marker, and a table that does costs only time.
_JFIF = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"
_UNUSUAL_MARKER = re.compile(rb"\xff[^\x00\xc0\xc4\xd0-\xd7\xd9-\xdb\xdd\xfe]")

_SIXTEEN_TO_EIGHT_BIT = np.round(np.arange(1 << 16) / 257).astype(np.uint8)

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(image: Image.Image, size: int, mode: Literal["RGB", "L"] = "RGB") -> Pixels:
    """Turn an image into uint8 pixels: upright by its EXIF, shorter side resized to `size`, centre crop.

    Resizing is bicubic and antialiased. Alpha is dropped, not composited, as the loaders of torchvision and
    timm do with ``convert("RGB")``. 16-bit grayscale is divided by 257 and rounded.

    Args:
        image: Of any mode that has a meaning in 8 bits; left unchanged.
        size: Side of the square result, in pixels.
        mode: "RGB" for three channels, "L" for one.

    Returns:
        uint8 (3, size, size), or (1, size, size) for "L".

    Raises:
        DataError: The pixels have no agreed range (floating point, or integers beyond 0..65535).
        OSError: The image data is damaged; Pillow raises other types as well.
    """
    upright = _eight_bit(image)
    orientation = _orientation(image)
    if orientation in _TO_UPRIGHT:  # before resizing, which rounds in another order along the other axis
        upright = upright.transpose(_TO_UPRIGHT[orientation])
    pixels = np.asarray(fit(upright, size).convert(mode)).reshape(size, size, -1)
    return np.array(pixels.transpose(2, 0, 1), order="C")  # a copy, as Pillow's own memory is read-only


def decode_file(path: Path, size: int) -> Pixels:
    """`decode` to RGB from a file.

    Raises:
        DataError: Why the file gives no image, in a few words without its path.
    """
    try:
        whole = read_jpeg(path)
        if whole is not None:
            square = whole if whole.shape == (size, size, 3) else np.asarray(fit(Image.fromarray(whole), size))
            return np.array(square.transpose(2, 0, 1), order="C")
        with Image.open(path) as image:
            if image.width * image.height <= LARGE_PIXELS:
                return decode(image, size)
            with _one_large_image:
                image.draft(None, (2 * size, 2 * size))  # still antialiased afterwards; only JPEG can do it
                return decode(image, size)
    except UnidentifiedImageError as error:
        raise DataError("not an image that Pillow can read") from error
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files
        raise DataError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def read_jpeg(path: Path) -> Pixels | None:
    """The pixels of an ordinary JPEG file as Pillow gives them, by libjpeg-turbo without Pillow's detours.

    Ordinary is a baseline JPEG, RGB or grayscale, upright, undamaged, and not too large to be read whole.

    Returns:
        uint8 (H, W, 3); or None where Pillow has to read the file, or simplejpeg is not installed.

    Raises:
        OSError: The file cannot be read; Pillow raises other types where its header is damaged.
    """
    if simplejpeg is None or not _SAME_LIBRARY:
        return None
    with path.open("rb", buffering=0) as file:
        data = file.read(_FIRST_READ)
        if not data.startswith(b"\xff\xd8\xff"):
            return None
        if len(data) == _FIRST_READ:
            if os.fstat(file.fileno()).st_size > LARGE_PIXELS:
                return None
            data += file.read()
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > LARGE_PIXELS or colours not in ("YCbCr", "RGB", "Gray"):
            return None
        if not data.startswith(_JFIF) or _UNUSUAL_MARKER.search(data, len(_JFIF)):
            with Image.open(io.BytesIO(data)) as image:
                if image.mode not in ("RGB", "L") or "progressive" in image.info or _orientation(image) in _TO_UPRIGHT:
                    return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)
        return pixels
    except ValueError:  # damaged: Pillow says in which way, or shows what is left of it
        return None


def fit(image: Image.Image, size: int) -> Image.Image:
    """Centre square of an 8-bit image, resized to (size, size): bicubic, antialiased.

    One resize of a box, not a resize and then a crop: a 1-pixel-wide image never grows into a huge strip.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def fit_planes(pixels: Pixels, size: int) -> Pixels:
    """`fit` for any number of channels, each by itself as in RGB: uint8 (C, H, W) to (C, size, size)."""
    return np.stack([np.asarray(fit(Image.fromarray(plane), size)) for plane in np.ascontiguousarray(pixels)])


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many types on damaged EXIF, and the photograph itself may be whole
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """The same image as "L" or "RGB": modes in which resizing mixes neither palette indices nor alpha."""
    if image.mode == "F":
        raise DataError("floating-point pixels have no agreed range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"integer pixels from {values.min()} to {values.max()}, expected 0..65535")
        return Image.fromarray(_SIXTEEN_TO_EIGHT_BIT[values])
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparent palettes
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
