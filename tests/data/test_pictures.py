"""Transparency, more than 8 bits, WhiteIsZero, other channels and very large pictures; values worked out by hand."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from remap.data.images import BadImage, decode, decode_channels
from remap.data.pixels import Pixels
from remap.data.splits import Split
from remap.data.value_range import find_value_range
from remap.data.views import View


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def npy(values: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: NDArray, photometric: int, sample_format: int = 1, order: str = "<") -> bytes:
    """One strip of one sample a pixel, written by TIFF 6.0, section 2."""
    (height, width), raw = values.shape, values.astype(values.dtype.newbyteorder(order)).tobytes()
    rows = [(256, 3, width), (257, 3, height), (258, 3, 8 * values.itemsize), (259, 3, 1), (262, 3, photometric)]
    rows += [(273, 4, 8 + 2 + 12 * 10 + 4), (277, 3, 1), (278, 3, height), (279, 4, len(raw)), (339, 3, sample_format)]
    fields = (struct.pack(f"{order}HHI", tag, kind, 1) + (struct.pack(f"{order}HH", value, 0) if kind == 3 else
              struct.pack(f"{order}I", value)) for tag, kind, value in rows)  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(rows))
    return head + b"".join(fields) + bytes(4) + raw


def png16(values_HWC: NDArray) -> bytes:
    """Colours of 16 bits, with or without alpha, which Pillow does not write (PNG specification, section 11)."""
    (height, width, count), lines = values_HWC.shape, values_HWC.astype(">u2")
    raw = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[count], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", raw), (b"IEND", b""))
    parts = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Red, opaque at a quarter (51 of 255 is a fifth), and black that cannot be seen.
RGBA = np.array([[[255, 0, 0, 51], [0, 0, 0, 0], [10, 20, 30, 255]]], np.uint8)
PALETTE = Image.new("P", (3, 1))
PALETTE.putpalette([255, 0, 0, 10, 20, 30])
PALETTE.putpixel((2, 0), 1)
COLOURED = {
    "PNG": (encoded(Image.fromarray(RGBA)), [[255, 204, 204], [255] * 3, [10, 20, 30]]),
    "WebP": (encoded(Image.fromarray(RGBA), "WEBP", lossless=True), [[255, 204, 204], [255] * 3, [10, 20, 30]]),
    "LA": (encoded(Image.fromarray(RGBA[:, :, 2:])), [[204] * 3, [255] * 3, [30] * 3]),
    "palette": (encoded(PALETTE, transparency=0), [[255] * 3, [255] * 3, [10, 20, 30]]),
    "one transparent colour": (encoded(Image.new("RGB", (3, 1), (1, 2, 3)), transparency=(1, 2, 3)), [[255] * 3] * 3),
    "16 bits": (png16(RGBA.astype(np.uint16) * 257), [[255, 204, 204], [255] * 3, [10, 20, 30]]),
}  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), COLOURED.values(), ids=list(COLOURED))
def test_transparent_pixels_are_white(data: bytes, expected: list[list[int]]) -> None:
    """c a + 255 (1 - a), a = alpha / 255."""
    assert np.asarray(decode(data, Pixels(alpha="white"))).tolist() == [expected]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        ("black", [[51, 0, 0], [0, 0, 0], [10, 20, 30]]),
        ("checker", [[255, 204, 204], [255, 255, 255], [10, 20, 30]]),  # the first square is white
        ("drop", [[255, 0, 0], [0, 0, 0], [10, 20, 30]]),  # as in tasks of earlier versions
    ],
)
def test_what_transparent_pixels_show_is_a_setting(alpha: str, expected: list[list[int]]) -> None:
    assert np.asarray(decode(COLOURED["PNG"][0], Pixels(alpha=alpha))).tolist() == [expected]


def test_a_checkerboard_has_squares_of_eight_pixels() -> None:
    shown = np.asarray(decode(encoded(Image.new("LA", (24, 9))), Pixels(alpha="checker")))[:, :, 0]
    assert (shown[0, 7], shown[0, 8], shown[0, 16], shown[8, 0], shown[8, 8]) == (255, 204, 255, 204, 255)


def test_opaque_pictures_are_what_pillow_makes_of_them() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    noise[:, :, 3] = 255
    for channels in (noise[:, :, 0], noise[:, :, :3], noise):
        picture = Image.fromarray(channels)
        assert decode(encoded(picture), Pixels(alpha="white")) == picture.convert("RGB")


RAMP = np.arange(64).reshape(4, 16)
WIDE = {
    "16 bits": (np.uint16, 1, "<"),
    "16 bits, big endian": (np.uint16, 1, ">"),
    "32 bits": (np.uint32, 1, "<"),
    "32 bits, signed": (np.int32, 2, "<"),
    "16 bits, signed": (np.int16, 2, "<"),
    "float": (np.float32, 3, "<"),
}


@pytest.mark.parametrize(("kind", "sample_format", "order"), WIDE.values(), ids=list(WIDE))
@pytest.mark.parametrize("photometric", [0, 1])
def test_white_is_zero_at_every_depth(kind: type, sample_format: int, order: str, photometric: int) -> None:
    """A grey of v / 63 of the range is v / 63 of 255; where 0 is white, that from white."""
    values = (RAMP * 600 - (20000 if sample_format == 2 else 0)).astype(kind)
    ends = (float(values.min()), float(values.max()))
    found = np.asarray(decode(tiff(values, photometric, sample_format, order), Pixels(value_range=ends)))[:, :, 0]
    wanted = np.rint(RAMP / 63 * 255)
    assert (found == (wanted if photometric else 255 - wanted)).all()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["npy", "tiff"])
def test_a_dark_picture_of_16_bits_is_dark_in_either_order_of_bytes(order: str, kind: str) -> None:
    """255 and 129 of 65,535 are 0.99 and 0.502 of 255. No range: no training image had more than 8 bits."""
    values = np.array([[255, 129, 0]], np.dtype(f"{order}u2"))
    data = npy(values) if kind == "npy" else tiff(values, 1, order=order)
    assert np.asarray(decode(data).convert("L")).tolist() == [[1, 1, 0]]


def test_unsigned_32_bits_are_not_read_as_signed() -> None:
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    assert np.asarray(decode(tiff(values, 1), Pixels(value_range=(0, 2**32 - 1))))[0, :, 0].tolist() == [0, 128, 255]


def folder(*values: NDArray, encode: Any = npy) -> Split:
    data = [encode(one) for one in values]
    return Split(tuple(f"{i}.npy" for i in range(len(data))), np.zeros(len(data), np.int64), lambda i: data[i])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.uint16) * 5 + 400, (400, 715)),  # 10 bits in 16
        (RAMP.astype(np.uint16) * 160, (0, 10080)),  # reflectance
        (np.stack([RAMP.astype(np.uint16) * 160] * 3, 2), (0, 10080)),
        (RAMP.astype(np.int16) * 60 - 1000, (-1000, 2780)),  # CT
        (RAMP.astype(np.float32) - 5.5, (-5.5, 57.5)),
        (RAMP.astype(np.uint16) * 4, (0, 255)),  # 8 bits in 16
        (RAMP.astype(np.uint16) * 1000, (0, 65535)),
        (RAMP.astype(np.float32) / 64, (0, 1)),
        (np.full((4, 4), 7, np.uint16), (7, 8)),
        (RAMP.astype(np.uint8), None),
    ],
)
def test_the_range_of_training_images_is_found(values: NDArray, expected: tuple[float, float] | None) -> None:
    split = folder(values, values[:2])
    assert find_value_range(split, Pixels()) == find_value_range(split, Pixels()) == expected


def test_a_hot_pixel_does_not_decide_the_range() -> None:
    """1 of 2,500 pixels is less than the thousandth that may lie outside."""
    values = np.full((50, 50), 1000, np.uint16)
    values[:10], values[20, 20] = 600, 65535
    assert find_value_range(folder(values), Pixels()) == (600, 1000)


@pytest.mark.parametrize("kind", [np.int8, np.int16])
def test_signed_arrays_are_scaled_by_the_range(kind: type) -> None:
    """By hand: -32 to 31 on 0 to 255, one step is 255 / 63; int8 as int16."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([[-32, -1, 0, 31]], kind))
    found = np.asarray(decode(buffer.getvalue(), Pixels(value_range=(-32, 31))))[0, :, 0]
    assert found.tolist() == [0, 125, 130, 255]
    split = Split(("a.npy",), np.zeros(1, np.int64), lambda _: buffer.getvalue())
    assert find_value_range(split, Pixels()) == (-32, 31)


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 4)])
def test_colours_of_16_bits_keep_their_lower_bits(shape: tuple[int, ...]) -> None:
    """Pillow alone gives the upper 8 of them: 0 to 15 of 12-bit values."""
    values = np.random.default_rng(0).integers(0, 4096, shape)
    values[:, :, 3:] = 65535
    wanted = np.rint(values[:, :, :3] / 4095 * 255)
    assert (np.asarray(decode(png16(values), Pixels(alpha="white", value_range=(0, 4095)))) == wanted).all()
    split = Split(("a.png",), np.zeros(1, np.int64), lambda _: png16(values))
    assert find_value_range(split, Pixels()) == (values[:, :, :3].min(), values[:, :, :3].max())


# Rows, columns and channels of different length, and the values of channel c of pixel (y, x).
CUBE = np.arange(5 * 6 * 4, dtype=np.uint8).reshape(5, 6, 4)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize(
    "stored", ["channels last", "channels first", "columns first", "tiff", "tiff in planes", "tiff of pages"]
)
def test_arrays_and_tiffs_have_any_number_of_channels(channels: int, stored: str) -> None:
    """Every channel is resized as Pillow resizes a grey picture."""
    values = CUBE[:, :, :channels]
    if stored.startswith("tiff"):
        tifffile, buffer = pytest.importorskip("tifffile"), io.BytesIO()
        parts = {"tiff": [values], "tiff in planes": [values.transpose(2, 0, 1)]}
        with tifffile.TiffWriter(buffer) as file:
            for part in parts.get(stored, [values[:, :, c] for c in range(channels)]):
                kind = "separate" if stored == "tiff in planes" else None
                file.write(part, photometric="minisblack", planarconfig=kind)
        data = buffer.getvalue()
    else:
        first = values.transpose(2, 0, 1)
        data = npy({"channels last": values, "channels first": first}.get(stored, np.asfortranarray(values)))
    seen = View((4, 8), 1.0, "bilinear", Pixels(channels)).read(data)
    box = (0, 1, 6, 4)  # 6 x 3 of 6 x 5 pixels has the shape of 8 x 4
    for c in range(channels):
        grey = Image.fromarray(np.ascontiguousarray(values[:, :, c]))
        assert (seen[c] == np.asarray(grey.resize((8, 4), Image.Resampling.BILINEAR, box=box))).all()


def test_greys_are_the_luma_of_colours_and_colours_three_equal_greys() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8))
    assert decode(encoded(picture), Pixels(1)) == picture.convert("L")
    assert np.asarray(decode(npy(CUBE[:, :, 0]))).tolist() == np.stack([CUBE[:, :, 0]] * 3, 2).tolist()
    assert [np.asarray(c).tolist() for c in decode_channels(encoded(Image.fromarray(CUBE)), Pixels(4))] == [
        CUBE[:, :, c].tolist() for c in range(4)
    ]


BAD = {
    "objects": (npy(np.array([[{}]], dtype=object)), 3, "not of numbers"),
    "cut off": (npy(CUBE)[:-1], 4, "cut off: 119 bytes of 120"),
    "one dimension": (npy(CUBE[0, 0]), 3, "not .height, width, channels."),
    "other channels": (npy(CUBE), 8, "4 channels; the model takes 8"),
    "colours for many": (encoded(Image.new("RGB", (2, 2))), 8, "3 channels; the model takes 8"),
    "terabytes": (npy(CUBE).replace(b"(5, 6, 4), } ", b"(999999, 9999)}"), 3, "9,999 MB of values, above 358"),
    "header": (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, 3, "."),
}


@pytest.mark.parametrize(("data", "channels", "reason"), BAD.values(), ids=list(BAD))
def test_arrays_that_are_no_pictures_say_why(data: bytes, channels: int, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode_channels(data, Pixels(channels))


def huge_png(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + head + crc + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    ("size", "megapixels", "reason"),
    [
        ((1, 80_000_000), 500, "80,000,000 pixels, above the limit of 131,072 on a side"),
        ((20_000, 30_000), None, "above the limit of 500 megapixels"),
        ((12_000, 9_000), None, r"above the limit of 89.48 megapixels .a run with data.max_megapixels=108 reads it."),
        ((12_000, 9_000), 107.0, r"a run with data.max_megapixels=108"),
    ],
)
def test_pictures_too_large_are_refused_by_their_header(
    size: tuple[int, int], megapixels: float | None, reason: str
) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(huge_png(*size), Pixels(megapixels=megapixels))


def test_a_setting_allows_larger_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encoded(Image.new("L", (30, 30))), Pixels(megapixels=0.001)).size == (30, 30)


@pytest.mark.parametrize(("limit", "size"), [(1600, (40, 40)), (1599, (20, 20)), (399, (10, 10)), (99, (5, 5))])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(
    limit: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half, quarter or eighth (libjpeg's scaling), the first that fits; a flat picture stays what it is."""
    data = encoded(Image.new("RGB", (40, 40), (90, 90, 90)), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    picture = decode(data)
    assert picture.size == size and np.ptp(np.asarray(picture)) == 0
    if limit < 1600:
        with pytest.raises(BadImage, match="max_megapixels"):
            decode(encoded(Image.new("RGB", (40, 40)), "JPEG", progressive=True))


def test_an_animation_is_its_first_picture() -> None:
    frames = [Image.new("L", (2, 2), grey) for grey in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data)).tolist() == [[[10] * 3] * 2] * 2
