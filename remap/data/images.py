"""Decode one image file of any mode to the channels that a network takes."""

import io
import struct
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from remap.data.pixels import MOST_MEGAPIXELS, RGB, Pixels
from remap.data.stored_values import StoredValues, needs_tifffile, of_image, of_npy, of_tiff, upright
from remap.errors import RemapError
from remap.io.checked_read import read_regular
from remap.io.names import plain

warnings.filterwarnings("ignore", message="Corrupt EXIF data", module="PIL")

# What torchvision's ImageFolder reads, plus .avif and arrays of numpy; anything else in a class folder is left out.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".npy")
# Of these, formats without transparency, and those of 8 bits.
ALWAYS_OPAQUE = (".jpg", ".jpeg", ".bmp", ".ppm", ".pgm")
ALWAYS_8_BITS = (".jpg", ".jpeg", ".bmp", ".webp", ".avif", ".gif")

# Photographs of telephones, read where pillow-heif (the extra "heic") is installed.
HEIC, HEIC_SUFFIXES = find_spec("pillow_heif") is not None, (".heic", ".heif")

# What these files may hold, under any name: MPO is what some cameras write as .jpg, GIF what the web calls so.
# Pillow's other readers stay out: one for EPS starts Ghostscript, others hand work to programs or are hardly used.
FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "AVIF", "GIF")
# One encoded image; the largest that Pillow's limit of pixels lets pass is 500 MB without any compression.
MAX_BYTES = 2**30
# Rows take memory of their own, however short: a PNG of 80 million rows of one pixel 2.7 GB.
LONGEST_SIDE = 2**17
# Pillow's decoder of JPEG reads at these fractions of the size, in as little memory.
_REDUCTIONS = (2, 4, 8)
# Two by two of the squares behind transparent pixels.
_SQUARES = np.kron(np.array([[255, 204], [204, 255]], np.uint8), np.ones((8, 8), np.uint8))
# Above Pillow's limit one picture at a time, however many threads decode.
_LARGE = threading.Lock()


class BadImage(RemapError):
    """An image that cannot be decoded.

    Attributes:
        reason: Why, in a few words, for lists of several.
    """

    def __init__(self, reason: str, source: object = None) -> None:
        self.reason = reason
        given = source if isinstance(source, Path) else None
        super().__init__(f"an image cannot be read: {reason}", given=given, do="repair it or leave it out")


def decode(source: bytes | Path | Image.Image, pixels: Pixels = RGB) -> Image.Image:
    """Return the first of ``decode_channels``: for a network of colours an RGB image, for one of greys an L image."""
    return decode_channels(source, pixels)[0]


def decode_channels(source: bytes | Path | Image.Image, pixels: Pixels = RGB) -> tuple[Image.Image, ...]:
    """Return an upright picture from a file, its content, or what Pillow opened.

    EXIF rotation is applied, more than 8 bits are scaled, palettes and CMYK are converted, and transparent pixels are
    put on ``pixels.alpha``. Of an animation or several pages it is the first.

    Returns:
        One image, RGB or L, for 3 channels or 1; for other numbers an L image for each.

    Raises:
        BadImage: Truncated, empty, not an image, of other channels, or larger than allowed.
    """
    try:
        if isinstance(source, Image.Image):
            return _of_image(source, pixels, b"")
        data = source if isinstance(source, bytes) else read_regular(source, MAX_BYTES)
        if (values := _of_array(data, pixels)) is not None:
            return _scaled(values, pixels)
        with open_picture(data) as image:
            return _of_image(image, pixels, data)
    except RemapError:  # a signal that came meanwhile
        raise
    except Exception as error:  # Pillow's decoders raise many kinds; all mean the file is no usable image
        raise BadImage(reason_of(error), source) from error


def encoded(image: Image.Image) -> bytes:
    """Return a picture as a file without loss; the same bytes from every version of Pillow."""
    file = io.BytesIO()
    image.save(file, "PPM")
    return file.getvalue()


def wide_values(data: bytes, pixels: Pixels) -> StoredValues | None:
    """Return what an image file of more than 8 bits holds; None for 8 bits, and for what cannot be read."""
    try:
        values = _of_array(data, pixels)
        if values is None:
            with open_picture(data) as image, require_small(image, pixels):
                values = of_image(image, lambda: open_picture(data))
    except RemapError:
        raise
    except Exception:  # decoding says why
        return None
    return values if values is not None and values.is_wide else None


def stored_channels(data: bytes) -> int | None:
    """Return how many channels an .npy file or a TIFF of many holds; None for others, and for what cannot be read."""
    try:
        return None if (values := _of_array(data, RGB)) is None else values.values_HWC.shape[2]
    except RemapError:
        raise
    except Exception:  # decoding says why
        return None


def open_picture(data: bytes) -> ImageFile.ImageFile:
    """Open as ``PIL.Image.open`` does, but for its limit of pixels, which is one for the whole process."""
    for name in _formats():
        factory, accepts = Image.OPEN[name]
        accepted = accepts is None or accepts(data[:16])
        if accepted and not isinstance(accepted, str):  # a text says what this build lacks
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise Image.UnidentifiedImageError("not an image")


@cache
def _formats() -> tuple[str, ...]:
    """Return those that this build of Pillow has."""
    Image.init()
    if HEIC:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)


def _of_array(data: bytes, pixels: Pixels) -> StoredValues | None:
    """Return the values of an .npy file, or of a TIFF that Pillow does not read as it is; None for other files."""
    most_bytes = 4 * _limit(pixels)
    if data.startswith(b"\x93NUMPY"):
        return of_npy(data, pixels.channels, most_bytes)
    try:
        image = open_picture(data) if data[:2] in (b"II", b"MM") else None
    except Image.UnidentifiedImageError:
        image = None
    return of_tiff(data, pixels.channels, most_bytes) if needs_tifffile(data, pixels.channels, image) else None


def _of_image(image: Image.Image, pixels: Pixels, data: bytes) -> tuple[Image.Image, ...]:
    with require_small(image, pixels):
        values = of_image(image, (lambda: open_picture(data)) if data else None)
        if values is not None:
            return _scaled(values, pixels)
        image.load()
        # What is upright need not be copied, unless it is the caller's.
        return _in_channels(upright(image), pixels)


def _limit(pixels: Pixels) -> float:
    """Return how many pixels are decoded whole."""
    if pixels.megapixels is not None:
        return pixels.megapixels * 1e6
    return Image.MAX_IMAGE_PIXELS or MOST_MEGAPIXELS * 1e6


def require_small(image: Image.Image, pixels: Pixels) -> AbstractContextManager:
    """Refuse a picture that is too large; a JPEG is reduced by its decoder instead, to the largest size that fits.

    Returns:
        To be held while it is decoded.
    """
    (width, height), limit = image.size, _limit(pixels)
    count = width * height
    if max(image.size) > LONGEST_SIDE:
        raise ValueError(f"{width:,} x {height:,} pixels, above the limit of {LONGEST_SIDE:,} on a side")
    if count > MOST_MEGAPIXELS * 1e6:
        raise ValueError(f"{width:,} x {height:,} pixels, above the limit of {MOST_MEGAPIXELS:g} megapixels")
    if count > limit and image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
        fraction = next((by for by in _REDUCTIONS if count / by**2 <= limit), _REDUCTIONS[-1])
        image.draft(None, (width // fraction, height // fraction))
    if image.width * image.height > limit:
        # A student reads pictures as it was trained to: the limit is not one of the moment.
        allow = f"a run with data.max_megapixels={-(-count // 10**6)} reads it"
        raise ValueError(f"{width:,} x {height:,} pixels, above the limit of {limit / 1e6:.4g} megapixels ({allow})")
    return _LARGE if count > (Image.MAX_IMAGE_PIXELS or limit) else nullcontext()


def _scaled(values: StoredValues, pixels: Pixels) -> tuple[Image.Image, ...]:
    values_HWC = values.to_8_bits(pixels.value_range)
    count = values_HWC.shape[2]
    if count in (1, 3) and (pixels.channels in (1, 3) or values.alpha is not None):
        image = Image.fromarray(values_HWC if count == 3 else values_HWC[:, :, 0])
        if values.alpha is not None:
            image.putalpha(values.alpha)
        return _in_channels(image, pixels)
    if count != pixels.channels:
        raise _other_channels(count, pixels)
    return tuple(Image.fromarray(np.ascontiguousarray(values_HWC[:, :, c])) for c in range(count))


def _in_channels(image: Image.Image, pixels: Pixels) -> tuple[Image.Image, ...]:
    """Convert any mode to 8-bit channels."""
    if pixels.channels in (1, 3):
        rgb = _on_backdrop(image, pixels.alpha) if image.has_transparency_data else image.convert("RGB")
        return (rgb if pixels.channels == 3 else rgb.convert("L"),)
    if image.mode not in ("RGBA", "RGBX", "LA") or len(image.getbands()) != pixels.channels:
        raise _other_channels(len(image.getbands()), pixels)
    return image.split()


def _other_channels(count: int, pixels: Pixels) -> ValueError:
    return ValueError(f"{count} channels; the model takes {pixels.channels}")


def _on_backdrop(image: Image.Image, alpha: str) -> Image.Image:
    if alpha == "drop" and image.mode != "P":  # a palette with transparency has no way to RGB but by RGBA
        return image.convert("RGB")
    image = image.convert("RGBA")
    if alpha == "drop":
        return image.convert("RGB")
    if alpha == "checker":
        repeats = (-(-image.height // len(_SQUARES)), -(-image.width // len(_SQUARES)))
        squares = np.tile(_SQUARES, repeats)[: image.height, : image.width]
        result = Image.fromarray(np.ascontiguousarray(squares)).convert("RGB")
    else:
        result = Image.new("RGB", image.size, alpha)
    result.paste(image, mask=image.getchannel("A"))
    return result


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
