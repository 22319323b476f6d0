"""``data.decode=fast``: torchvision's decoder and PyTorch's resize against Pillow's own calls on the same files."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from remap.data import fast_views
from remap.data.images import BadImage
from remap.data.pixels import Pixels
from remap.data.views import View
from remap.errors import DataError
from remap.pipeline.run import validate_inputs
from remap.pipeline.shared import SharedResources
from remap.recipe import resolve

VIEW = View(32, 0.875, "bicubic", Pixels(decode="fast"))


def picture(size: tuple[int, int] = (128, 96), seed: int = 0) -> Image.Image:
    """Smooth colours, as in photographs: of noise, a decoder's rounding would be all there is."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(image: Image.Image, box: tuple[int, int, int, int], size: int = 32) -> np.ndarray:
    """The box is cut out first: PyTorch reads no pixel outside of it."""
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_view_is_pillows_of_the_same_whole_pixels(kind: str) -> None:
    """128 x 96, crop 0.875: 84 of 96 pixels from (22, 6) on. Both resizers round, to numbers 1 apart."""
    data = encoded(picture(), kind)
    made = VIEW.read(data)
    expected = pillow(Image.open(io.BytesIO(data)).convert("RGB"), (22, 6, 106, 90))
    assert made.shape == VIEW.shape and made.flags["C_CONTIGUOUS"]
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_torchvision_decodes_what_pillow_would_and_pillow_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "plain": encoded(picture()),
        "progressive": encoded(picture(), progressive=True),
        "grey": encoded(picture().convert("L")),
        "turned": encoded(picture(), exif=turned),
        "turned by XMP": encoded(picture(), xmp=b'<rdf:Description tiff:Orientation="6"/>'),
        "CMYK": encoded(picture().convert("CMYK")),
    }
    made = {name: VIEW.read(data).astype(int) for name, data in files.items()}
    decode, calls = fast_views._decoder(), list[int]()
    monkeypatch.setattr(fast_views, "_decoder", lambda: lambda data: calls.append(1) or decode(data))
    counts = {name: (calls.clear(), VIEW.read(data), len(calls))[2] for name, data in files.items()}
    assert counts == {"plain": 1, "progressive": 1, "grey": 1, "turned": 0, "turned by XMP": 0, "CMYK": 0}
    # A torchvision without decoders, as is announced: the same pixels.
    monkeypatch.setattr(fast_views, "_decoder", lambda: None)
    assert all(np.array_equal(VIEW.read(data), made[name]) for name, data in files.items())
    for name in ("turned", "turned by XMP"):
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(files[name])))
        assert upright.size == (96, 128)
        assert np.abs(made[name] - pillow(upright, (6, 22, 90, 106))).max() <= 1


def test_training_without_a_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision without decoders, and no torchcodec; a run checks before it makes its folder."""
    monkeypatch.setattr(fast_views, "_decoder", lambda: None)
    with pytest.raises(DataError, match="torchcodec is not installed") as caught:
        validate_inputs(resolve(None, {}, ["data.decode=fast"]), SharedResources())
    assert "data.decode=exact" in (caught.value.do or "")


def test_torchcodec_decodes_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchcodec from before 0.16, or for another PyTorch, leaves it to torchvision."""
    calls: list[dict[str, Any]] = []
    codec = ModuleType("torchcodec.decoders")
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", codec)
    decoder = fast_views._decoder.__wrapped__
    assert decoder().func.__module__.startswith("torchvision")
    codec.decode_jpeg = lambda data, **options: calls.append(options)  # type: ignore[attr-defined]
    decoder()(b"")
    assert calls == [{"mode": "RGB"}]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}], ids=str)
def test_a_decoder_has_the_pixels_of_pillow(options: dict[str, Any]) -> None:
    """Of torchcodec where it is installed, else of torchvision."""
    for image in (picture(), picture().convert("L"), picture((131, 97))):
        data = encoded(image, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
        decode = fast_views._decoder()
        assert decode is not None
        assert np.array_equal(decode(torch.frombuffer(bytearray(data), dtype=torch.uint8)).numpy(), expected)


def test_a_much_larger_jpeg_is_decoded_at_reduced_size() -> None:
    """32 pixels show 420 of 480, so 64 are wanted: an eighth has 52, a quarter 105."""
    data = encoded(picture((640, 480)), quality=95)
    quarter = Image.open(io.BytesIO(data))
    quarter.draft("RGB", (160, 120))
    assert quarter.size == (160, 120)
    made, whole = VIEW.read(data).astype(int), replace(VIEW, pixels=Pixels()).read(data).astype(int)
    assert np.abs(made - pillow(quarter.convert("RGB"), (28, 8, 133, 113))).max() <= 1
    assert np.abs(made - whole).mean() < 4.0


def test_a_jpeg_above_the_limit_of_megapixels_is_reduced_as_for_exact_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 x 304 pixels, 0.05 megapixels allowed: half the size is decoded, by Pillow, and the whole of it by nothing.

    The expected view is Pillow's of its own decoding at half the size: 133 of 152 pixels, from 34 and 10 on.
    """
    monkeypatch.setattr(fast_views, "_decoder", lambda: pytest.fail("decoded whole"))
    data = encoded(picture((400, 304)))
    view = View(128, 0.875, "bicubic", Pixels(decode="fast", megapixels=0.05))
    half = Image.open(io.BytesIO(data))
    half.draft("RGB", (200, 152))
    assert half.size == (200, 152)
    made = view.read(data).astype(int)
    assert np.abs(made - pillow(half, (34, 10, 167, 143), 128)).max() <= 1


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"text", encoded(picture())[:200], encoded(picture())[:-40]])
def test_what_pillow_refuses_is_refused_in_the_same_words(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(data)
    reasons = []
    for decode in ("exact", "fast"):
        with pytest.raises(BadImage) as caught:
            replace(VIEW, pixels=Pixels(decode=decode)).read(tmp_path / "image.jpg")
        reasons.append(caught.value.reason)
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_small_pictures_are_what_they_always_were(kind: str) -> None:
    data = encoded(picture((95, 96)), kind)
    assert np.array_equal(VIEW.read(data), replace(VIEW, pixels=Pixels()).read(data))


def test_a_missing_file_is_refused_as_ever(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="no such file"):
        VIEW.read(tmp_path / "none.jpg")


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels: int) -> None:
    image = picture().convert("RGBA")
    view = replace(VIEW, pixels=Pixels(channels, decode="fast"))
    exact = replace(VIEW, pixels=Pixels(channels)).read(encoded(image, "PNG"))
    made = view.read(encoded(image, "PNG"))
    assert made.shape == (channels, 32, 32) and np.abs(made.astype(int) - exact.astype(int)).mean() < 4.0


def test_the_view_of_a_task_and_of_a_cache_says_so() -> None:
    assert VIEW.to_dict()["pixels"] == {"decode": "fast"} and "pixels" not in View(32, 0.875, "bicubic").to_dict()
    assert "exact or fast" in (Pixels(decode="slow").problem() or "").replace(", ", " or ")
