"""Faster views: PyTorch's decoders of JPEG (torchcodec, torchvision) and its resize, which is not quite Pillow's.

The centre crop begins and ends at whole pixels (torchvision's does too), and a JPEG far larger than the view is decoded
at a quarter or eighth of its size. Letters: C channels, H and W height and width in pixels.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F

from remap.data.images import MAX_BYTES, decode_channels, open_picture, require_small
from remap.data.pixels import Pixels
from remap.errors import DataError, RemapError
from remap.io.checked_read import read_regular
from remap.io.versions import install_command

# Of torchvision from 0.29 on: what comes after it is taken where it is installed.
_SUPERSEDED = "The image decoding and encoding capabilities of TorchVision are deprecated"
warnings.filterwarnings("ignore", message=_SUPERSEDED, category=DeprecationWarning)

# What PyTorch resizes like Pillow; views of other interpolations are Pillow's.
INTERPOLATIONS = ("bicubic", "bilinear")
# Below so many pixels Pillow is faster, and makes the view as it always does.
SMALL = 96 * 96
# A reduced JPEG has at least so many pixels for one of the view on each side.
OVERSAMPLING = 2


def fast_view(
    source: bytes | Path | Image.Image,
    pixels: Pixels,
    shape: tuple[int, int, int],
    crop_pct: float,
    interpolation: str,
    exact: Callable[..., NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Return what ``View.read`` does, nearly; the other arguments are the fields of a view.

    Args:
        exact: ``View.apply``, which makes the views of small images.

    Raises:
        BadImage: It cannot be read.
    """
    _, height, width = shape
    if isinstance(source, Path):
        try:
            source = read_regular(source, MAX_BYTES)
        except OSError:
            decode_channels(source, pixels)  # says why
            raise
    planes_CHW = _jpeg(source, pixels, height, width, crop_pct) if isinstance(source, bytes) else None
    if planes_CHW is None:
        channels = decode_channels(source, pixels)
        if channels[0].width * channels[0].height < SMALL:
            return exact(*channels)
        planes_CHW = torch.from_numpy(np.dstack([np.asarray(one) for one in channels])).permute(2, 0, 1)
    down, across = _box(planes_CHW.shape[1], planes_CHW.shape[2], height, width, crop_pct)
    rows, columns = _whole(planes_CHW.shape[1], down), _whole(planes_CHW.shape[2], across)
    made = F.interpolate(planes_CHW[None, :, rows, columns], (height, width), mode=interpolation, antialias=True)
    return made[0].contiguous().numpy()


def _box(down: int, across: int, height: int, width: int, crop_pct: float) -> tuple[float, float]:
    """Return height and width of the crop of an image."""
    return min(down, across * height / width) * crop_pct, min(across, down * width / height) * crop_pct


def _whole(length: int, part: float) -> slice:
    """Return the pixels of a part in the middle of a side."""
    first = round((length - part) / 2)
    return slice(first, first + max(1, round(part)))


def _jpeg(data: bytes, pixels: Pixels, height: int, width: int, crop_pct: float) -> Tensor | None:
    """Return an upright JPEG in colours (3, H, W), perhaps reduced; None for all else, which Pillow decodes."""
    if pixels.channels != 3 or not data.startswith(b"\xff\xd8"):
        return None
    try:
        with open_picture(data) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # of Exif or XMP
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not turned
            if not plain or image.width * image.height < SMALL:
                return None
            size = image.size
            with require_small(image, pixels):  # may already reduce it
                down, across = _box(size[1], size[0], height, width, crop_pct)
                share = OVERSAMPLING * max(height / down, width / across)
                if share <= 1 / 4:  # at half the size, torchvision is as fast with all of it
                    image.draft(None, (ceil(size[0] * share), ceil(size[1] * share)))
                if image.size != size:
                    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
                decode = _decoder()
                return None if decode is None else decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RemapError:
        raise
    except Exception:  # decoders raise many kinds; Pillow says why, or reads it all the same
        return None


@cache
def _decoder() -> Callable[[Tensor], Tensor] | None:
    """Return a decoder of JPEG whose pixels are Pillow's: torchcodec's where it is installed, else torchvision's.

    None without either: Pillow makes the same views, more slowly.
    """
    try:
        from torchcodec.decoders import decode_jpeg as decode  # from 0.16 on

        return partial(decode, mode="RGB")
    except (ImportError, OSError, RuntimeError):  # not here, or built for another PyTorch
        pass
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # half a second
    except ImportError:
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB)


def require_decoder() -> None:
    """Refuse to train with ``data.decode=fast`` where it is not faster.

    Raises:
        DataError: There is no decoder.
    """
    if _decoder() is None:
        raise DataError(
            "data.decode=fast: this torchvision does not decode JPEG, and torchcodec is not installed",
            do=f"{install_command('fast')}, or set data.decode=exact, whose pixels differ a little",
        )
