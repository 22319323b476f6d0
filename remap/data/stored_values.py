"""Pictures of more than 8 bits, or of any number of channels: their values as stored, and their scaling to 8 bits.

Letters: H height, W width, C channels.
"""

import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from remap.io.versions import install_command

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Tags of TIFF 6.0, and what they hold where 0 stands for white, and in unsigned numbers.
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SEPARATE, _UNSIGNED = 0, 2, 1
# Pillow reads white as 0 with some depths only; it then leaves the values as they are.
for (_order, _photometric, *_rest), _modes in list(TiffImagePlugin.OPEN_INFO.items()):
    if _photometric == 1 and _modes[0] in ("I;16", "I;16B", "I", "F"):
        _table: dict[Any, Any] = TiffImagePlugin.OPEN_INFO
        _table.setdefault((_order, _WHITE_IS_ZERO, *_rest), _modes)
# What makes a picture upright, by the orientation that EXIF or XMP says (EXIF 2.32, tag 0x0112).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of the header of an .npy file, and how many values are scaled at once.
_NPY_HEADER_BYTES, _AT_ONCE = 10_000, 2**22


@dataclass(frozen=True)
class StoredValues:
    """What a file holds.

    Attributes:
        values_HWC: Unsigned, signed or floating point.
        inverted: The smallest value is white.
        alpha: Opacity of each pixel, 8 bit; None where all are opaque.
    """

    values_HWC: NDArray
    inverted: bool = False
    alpha: Image.Image | None = None

    @property
    def is_wide(self) -> bool:
        """Whether the values are scaled to 8 bits: those of unsigned bytes are such already."""
        return self.values_HWC.dtype.itemsize > 1 or self.values_HWC.dtype.kind == "i"

    def to_8_bits(self, value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
        """Return the range scaled to 0..255, as (H, W, C); values outside of it are clipped.

        Args:
            value_range: None for 8 bits as they are, 16 bits by 257, other types as they are up to 255, else by 257;
                floats up to 1 are shares of white.

        Raises:
            ValueError: A value is not finite.
        """
        values = self.values_HWC
        if self.is_wide:
            low, high = value_range or _range_of_type(values)
            values, wide = np.empty(values.shape, np.uint8), values
            rows = max(1, _AT_ONCE // max(1, wide[0].size))
            for start in range(0, len(wide), rows):  # a part at a time: float64 takes several times the file's memory
                part = wide[start : start + rows].astype(np.float64)
                if not np.isfinite(part).all():
                    raise ValueError("holds values that are not finite")
                values[start : start + rows] = np.rint(((part - low) * (255.0 / (high - low))).clip(0, 255))
        return 255 - values if self.inverted else values


def _range_of_type(values: NDArray) -> tuple[float, float]:
    largest = values.max(initial=0)
    # In either order of bytes: 16 bits of the other order are not np.uint16.
    if values.dtype.newbyteorder("=") == np.uint16 or largest > 255:
        return 0.0, 65535.0
    return (0.0, 1.0) if values.dtype.kind == "f" and largest <= 1 else (0.0, 255.0)


def upright(image: Image.Image) -> Image.Image:
    """Return a picture as it is meant to be seen.

    Unlike ``ImageOps.exif_transpose`` it writes no EXIF, which fails where any tag is odd.
    """
    image.load()  # some formats say it at their end, and a TIFF is turned when it is read
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def of_image(image: Image.Image, open_again: Callable[[], ImageFile.ImageFile] | None) -> StoredValues | None:
    """Return the upright values of a picture with more than 8 bits a channel; None where there are only 8.

    Args:
        open_again: Opens the same picture. Pillow decodes colours of 16 bits to their upper 8 bits; a second time,
            with the order of bytes swapped, to the lower 8.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        tags = getattr(image, "tag_v2", {})
        values = np.asarray(upright(image))[:, :, None]
        if image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
            values = values.view(np.uint32)
        return StoredValues(values, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)
    if open_again is None or image.mode not in ("RGB", "RGBA") or not _has_16_bits(image):
        return None
    again = open_again()
    again.tile = [tile._replace(args=_swapped(tile.args)) for tile in again.tile]
    upper, lower = (upright(one) for one in (image, again))
    values = np.asarray(upper)[:, :, :3].astype(np.uint16) * 256 + np.asarray(lower)[:, :, :3]
    return StoredValues(values, alpha=upper.getchannel("A") if upper.mode == "RGBA" else None)


def _has_16_bits(image: Image.Image) -> bool:
    return any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))


def _swapped(args: Any) -> Any:
    if isinstance(args, tuple):
        return tuple(map(_swapped, args))
    if not isinstance(args, str) or ";16" not in args:
        return args
    big = args.endswith("B") or (args.endswith("N") and sys.byteorder == "big")
    return args[:-1] + ("L" if big else "B")


def needs_tifffile(data: bytes, channels: int, image: Image.Image | None) -> bool:
    """Return whether a TIFF is read by tifffile: other channels than grey and colour, and what Pillow does not read."""
    if not data.startswith(TIFF):
        return False
    if image is None:
        return True
    if channels not in (1, 3):
        return find_spec("tifffile") is not None
    tags = getattr(image, "tag_v2", {})
    return tags.get(_PLANAR) == _SEPARATE and max(tags.get(_BITS, (1,))) > 8


def of_tiff(data: bytes, channels: int, most_bytes: float) -> StoredValues:
    """Return the values of a TIFF of any number of channels; they may be pages of one size. It is not rotated.

    Raises:
        ValueError: tifffile is missing, or the values take more memory.
    """
    if find_spec("tifffile") is None:
        raise ValueError(f"a TIFF that Pillow does not read: {install_command('tiff')}")
    import tifffile  # an extra

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it finds damaged is said once, as the reason
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if not len(file.pages):
            raise ValueError("a damaged TIFF")
        first = file.pages.first
        paged = len(first.shape) == 2 and len(file.pages) == channels > 1
        shape, pages = (channels, *first.shape) if paged else first.shape, channels if paged else 1
        require_shape(shape, first.nbytes * pages, most_bytes)
        values = file.asarray(key=range(pages)).reshape(shape)
        return StoredValues(_channels_last(values, channels), int(first.photometric) == _WHITE_IS_ZERO)


def of_npy(data: bytes, channels: int, most_bytes: float) -> StoredValues:
    """Return the values of an .npy file: (H, W), (H, W, C) or (C, H, W) of numbers. Nothing is unpickled.

    Raises:
        ValueError: It is something else, or takes more memory.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an .npy file of version {version}, not 1.0 or 2.0")
    shape, by_columns, dtype = read(file, max_header_size=_NPY_HEADER_BYTES)
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise ValueError(f"an .npy file of {dtype}, not of numbers")
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=object))
    require_shape(shape, nbytes, most_bytes)
    if nbytes != len(data) - file.tell():
        raise ValueError(f"an .npy file cut off: {len(data) - file.tell():,} bytes of {nbytes:,}")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
    return StoredValues(_channels_last(values.astype(np.uint8) * 255 if dtype.kind == "b" else values, channels))


def require_shape(shape: tuple[int, ...], nbytes: float, most_bytes: float) -> None:
    """Refuse what is not a picture or takes more memory than the largest one that is allowed.

    Raises:
        ValueError: It does.
    """
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"of shape {shape}, not (height, width, channels)")
    if nbytes > most_bytes:
        raise ValueError(f"{nbytes / 1e6:,.0f} MB of values, above {most_bytes / 1e6:,.0f} (data.max_megapixels)")


def _channels_last(values: NDArray, channels: int) -> NDArray:
    """Return (H, W, C): the last dimension where it fits the model, else the first, else the smaller one of both."""
    if values.ndim == 2:
        return values[:, :, None]
    first, _, last = values.shape
    leads = first == channels if channels in (first, last) and first != last else first < last
    return values.transpose(1, 2, 0) if leads else values
