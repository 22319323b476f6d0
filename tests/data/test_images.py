"""Every mode a picture can have, with pixel values worked out by hand."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remap.data.images import BadImage, decode
from remap.errors import Interrupted, RemapError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> list[Any]:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def palette(transparent: int | None) -> bytes:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    return encoded(image, transparency=transparent) if transparent is not None else encoded(image)


def of(mode: str, *colours: Any) -> Image.Image:
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


def grey(*values: int) -> list[Any]:
    return [[[value] * 3 for value in values]]


MODES = {
    "L": (encoded(of("L", 0, 100, 255)), grey(0, 100, 255)),
    "LA drops alpha": (encoded(of("LA", (100, 0), (50, 255))), grey(100, 50)),
    "RGB": (encoded(of("RGB", (1, 2, 3))), [[[1, 2, 3]]]),
    "RGBA drops alpha": (encoded(of("RGBA", (10, 20, 30, 0), (1, 2, 3, 255))), [[[10, 20, 30], [1, 2, 3]]]),
    "P": (palette(None), [[[255, 0, 0], [10, 20, 30]]]),
    "P with a transparent colour": (palette(0), [[[255, 0, 0], [10, 20, 30]]]),
    "1 bit": (encoded(of("1", 0, 1)), grey(0, 255)),
    # 255 * (1 - C) * (1 - K): C = K = 51/255 gives 163.2, and 204 where C is 0.
    "CMYK": (
        encoded(of("CMYK", (255, 0, 0, 0), (0, 0, 0, 0), (51, 0, 0, 51)), "TIFF"),
        [[[0, 255, 255], [255, 255, 255], [163, 204, 204]]],
    ),
    # 65535 / 255 = 257 steps of 16 bit to one of 8; 128/257 = 0.498 rounds down, 129/257 = 0.502 up.
    "16 bit PNG": (encoded(of("I;16", 0, 128, 129, 257, 25700, 65535)), grey(0, 0, 1, 1, 100, 255)),
    "16 bit TIFF": (encoded(of("I;16", 0, 129, 25700, 65535), "TIFF"), grey(0, 1, 100, 255)),
    "16 bit TIFF, dark": (encoded(of("I;16", 200, 257), "TIFF"), grey(1, 1)),
    "32 bit TIFF": (encoded(of("I", 0, 25700, 65535, 10**6), "TIFF"), grey(0, 100, 255, 255)),
    "32 bit TIFF of 8-bit values": (encoded(of("I", 0, 100, 255), "TIFF"), grey(0, 100, 255)),
    "float TIFF of 8-bit values": (encoded(of("F", -3.0, 12.4, 255.0), "TIFF"), grey(0, 12, 255)),
    "float TIFF of 16-bit values": (encoded(of("F", 25700.0, 65535.0), "TIFF"), grey(100, 255)),
    "float TIFF of shares": (encoded(of("F", 0.0, 0.2, 1.0), "TIFF"), grey(0, 51, 255)),
    "GIF under any name": (encoded(of("L", 7, 200), "GIF"), grey(7, 200)),
    "BMP": (encoded(of("RGB", (9, 8, 7)), "BMP"), [[[9, 8, 7]]]),
    "PPM": (encoded(of("RGB", (9, 8, 7)), "PPM"), [[[9, 8, 7]]]),
    "WebP": (encoded(of("RGB", (9, 8, 7)), "WEBP", lossless=True), [[[9, 8, 7]]]),
}


@pytest.mark.parametrize(("data", "expected"), MODES.values(), ids=list(MODES))
def test_modes(data: bytes, expected: list[Any]) -> None:
    assert pixels(data) == expected


def test_big_endian_16_bit() -> None:
    """A TIFF written byte by byte (TIFF 6.0, section 2): big endian, 2 x 1, one 16-bit sample a pixel, uncompressed."""
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1)]
    entries.append((279, 4, 4))
    data = b"MM\x00\x2a" + (12).to_bytes(4, "big") + (25700).to_bytes(2, "big") + (65535).to_bytes(2, "big")
    data += len(entries).to_bytes(2, "big")
    for tag, kind, value in entries:
        field = value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big")
        data += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + field
    assert pixels(data + bytes(4)) == grey(100, 255)


UPRIGHT = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
# EXIF 2.32, tag 0x0112: which visual side the stored row 0 and the stored column 0 are.
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_rotation_comes_out_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    assert pixels(encoded(image, exif=exif)) == UPRIGHT.tolist()


def test_a_picture_is_turned_whatever_else_its_exif_says() -> None:
    """A resolution in letters, which Pillow reads and cannot write again; the bytes by TIFF 6.0, section 2."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"one")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    assert pixels(encoded(Image.fromarray(np.ascontiguousarray(STORED[6])), exif=exif)) == UPRIGHT.tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_one_pixel_wide_or_high(size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("L", size, 5))).size == size


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
BAD = {
    "empty": (b"", "not an image"),
    "text": (b"this is no picture", "not an image"),
    "cut PNG": (encoded(NOISE)[:900], "truncated"),
    "cut JPEG": (encoded(NOISE, "JPEG")[:-300], "truncated"),
    "header only": (encoded(NOISE)[:20], "Truncated"),
    "not a number": (encoded(of("F", float("nan"), 1.0), "TIFF"), "not finite"),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=list(BAD))
def test_what_is_no_picture_says_why(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, tmp_path / "a.jpg"):
        with pytest.raises(BadImage, match=reason) as caught:
            decode(source)
        why = caught.value.reason
        assert why and "\n" not in why and "0x" not in why and isinstance(caught.value, RemapError)
        assert str(caught.value).startswith(f"an image cannot be read: {why}")
        assert (str(source) in str(caught.value)) == isinstance(source, Path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadImage) as caught:
        decode(tmp_path / "a.png")
    assert caught.value.reason == "no such file"


def test_a_signal_while_decoding_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Interrupted("interrupted")

    monkeypatch.setattr("remap.data.images.require_small", stop)
    with pytest.raises(Interrupted):
        decode(encoded(Image.new("L", (1, 1))))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("height", [11, 19, 30])
def test_bombs_are_refused_from_the_limit_on_in_every_thread(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow itself only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encoded(Image.new("L", (10, 10)))).size == (10, 10)
    data = encoded(Image.new("L", (10, height)))

    def refused(_: int) -> bool:
        with pytest.raises(BadImage, match="limit|exceeds|bomb"):
            decode(data)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(refused, range(40)))
