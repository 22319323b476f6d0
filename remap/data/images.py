"""Decode one image file of any mode to RGB pixels."""

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from remap.errors import RemapError
from remap.io.checked_read import read_regular
from remap.io.names import plain

warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")

# What torchvision's ImageFolder reads, plus .avif; anything else in a class folder is named and left out.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif")

# What these files may hold, under any name: MPO is what some cameras write as .jpg, GIF what the web calls so.
# Pillow's other readers stay out: one for EPS starts Ghostscript, others hand work to programs or are hardly used.
FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "AVIF", "GIF")
# One encoded image; the largest that Pillow's limit of pixels lets pass is 500 MB without any compression.
MAX_BYTES = 2**30


class BadImage(RemapError):
    """An image that cannot be decoded.

    Attributes:
        reason: Why, in a few words, for lists of several.
    """

    def __init__(self, reason: str, source: object = None) -> None:
        self.reason = reason
        given = source if isinstance(source, Path) else None
        super().__init__(f"an image cannot be read: {reason}", given=given, do="repair it or leave it out")


def decode(source: bytes | Path | Image.Image) -> Image.Image:
    """Return an upright RGB image from a file, its content, or what Pillow opened.

    EXIF rotation is applied, 16-bit and float greys are scaled to 8 bit, palettes and CMYK are converted, and an
    alpha channel is dropped (as torchvision and timm do).

    Raises:
        BadImage: Truncated, empty, not an image, or larger than Pillow's limit against decompression bombs.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright(source)
        data = source if isinstance(source, bytes) else read_regular(source, MAX_BYTES)
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return _upright(image)
    except RemapError:  # a signal that came meanwhile
        raise
    except Exception as error:  # Pillow's decoders raise many kinds; all mean the file is no usable image
        raise BadImage(reason_of(error), source) from error


@cache
def _formats() -> tuple[str, ...]:
    """Return those that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    _require_small(image)
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _require_small(image: Image.Image) -> None:
    """Pillow refuses only twice its limit and warns below; turning warnings to errors is not safe in threads."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS:,}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _grey_of_wide_range(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey_of_wide_range(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys (Pillow opens them as I;16 or I) to 8 bit.

    Values within 0..255 are taken as they are, and floats within 0..1 as shares of white.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    if image.mode.startswith("I;16") or values.max(initial=0) > 255:
        values = values / 257.0
    elif image.mode == "F" and values.max(initial=0) <= 1:
        values = values * 255.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def reason_of(error: Exception) -> str:
    """Return why an image cannot be read, in a few words that show no path."""
    text = plain(str(error)).split("<")[0].strip().rstrip(":") or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text[:120]
