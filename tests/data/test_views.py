"""The square every network sees, against Pillow's own resize and crop."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from remap.data.splits import Split
from remap.data.views import View, ViewSource
from remap.errors import Interrupted
from remap.progress import Silent

FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "nearest", "lanczos")}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("width", "height", "crop_pct", "resized", "corner"),
    [
        (40, 24, 1.0, (20, 12), (4, 0)),
        (24, 40, 1.0, (12, 20), (0, 4)),
        (48, 32, 0.75, (24, 16), (6, 2)),
        (32, 32, 0.75, (16, 16), (2, 2)),
        (12, 12, 1.0, (12, 12), (0, 0)),
        (6, 6, 1.0, (12, 12), (0, 0)),
    ],
)
def test_a_view_is_the_resized_picture_cut_at_its_centre(
    width: int, height: int, crop_pct: float, resized: tuple[int, int], corner: tuple[int, int], interpolation: str
) -> None:
    """The usual evaluation transform (shorter side to size/crop_pct, centre crop), where its sizes are whole.

    Little contrast, so that no overshoot is clipped between Pillow's two passes; one level is left to their rounding.
    """
    image = noise(width, height).point(lambda value: 96 + value // 4)
    left, top = corner
    whole = image.resize(resized, FILTERS[interpolation])
    expected = np.asarray(whole.crop((left, top, left + 12, top + 12)), dtype=int).transpose(2, 0, 1)
    assert np.abs(View(12, crop_pct, interpolation).apply(image) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 4000)])
def test_a_sliver_never_becomes_a_giant(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: made.append(to) or resize(self, to, *a, **k))
    pixels = View(16, 0.9, "bicubic").apply(Image.new("RGB", size, (1, 2, 3)))
    assert made == [(16, 16)]
    assert pixels.shape == (3, 16, 16) and (pixels == np.asarray([1, 2, 3])[:, None, None]).all()


@pytest.mark.parametrize("memory_bytes", [0.0, 1e9])
def test_batches_are_contiguous(memory_bytes: float) -> None:
    """A strided batch would take another kernel of a convolution, whose last bits differ on some processors."""
    buffer = io.BytesIO()
    noise(9, 7).save(buffer, "PNG")
    split = Split(("a", "b"), np.asarray([0, 1]), lambda _: buffer.getvalue())
    source = ViewSource(split, View(5, 1.0, "bilinear"), memory_bytes=memory_bytes, workers=1)
    source.load(Silent(), "images")
    images, _ = source.batch([0, 1])
    assert images.shape == (2, 3, 5, 5) and images.is_contiguous()


def test_a_flat_picture_stays_flat_at_odd_sizes() -> None:
    for side in (1, 2, 5, 17, 33):
        assert (View(7, 0.875, "bicubic").apply(Image.new("RGB", (side, side + 3), (9, 9, 9))) == 9).all()


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("bad", [(), (2, 5)])
def test_views_are_the_same_in_memory_and_out_of_it(bad: tuple[int, ...]) -> None:
    data = [b"x" if i in bad else encoded(noise(10 + i, 12)) for i in range(7)]
    split = Split(tuple("abcdefg"), np.arange(7) % 2, lambda i: data[i])
    view = View(8, 0.875, "bicubic")
    kept, read = (ViewSource(split, view, memory_bytes=size, workers=2) for size in (7 * 3 * 64, 7 * 3 * 64 - 1))
    assert (kept.cached_bytes, read.cached_bytes) == (7 * 3 * 64, 0)
    kept.load(Silent(), "images")
    read.load(Silent(), "images")
    assert set(kept.bad) == set(bad) and read.bad == {}
    for indices in ([6, 0, 2, 0], [5], [], list(range(7))):
        (a, good_a), (b, good_b) = kept.batch(indices), read.batch(indices)
        assert good_a.tolist() == good_b.tolist() == [i for i in indices if i not in bad]
        assert a.dtype == b.dtype == torch.uint8 and a.shape[1:] == b.shape[1:] == (3, 8, 8) and torch.equal(a, b)
    assert read.bad == kept.bad
    left, right = kept.without_bad(), read.without_bad()
    assert left.split.names == right.split.names == tuple(name for i, name in enumerate("abcdefg") if i not in bad)
    assert torch.equal(left.batch([0, 3])[0], right.batch([0, 3])[0])


def test_a_stop_does_not_wait_for_the_other_images() -> None:
    """One thread, 1,000 images: what is not begun when the wait is left is never read."""
    begun: list[int] = []

    def read(index: int) -> bytes:
        begun.append(index)
        time.sleep(0.005)
        buffer = io.BytesIO()
        Image.new("L", (2, 2)).save(buffer, format="PNG")
        return buffer.getvalue()

    class Stopped(Silent):
        @contextmanager
        def wait(self, what: str, total: int | None = None) -> Iterator["Stopped"]:
            yield self

        def advance(self, amount: int = 1, **values: float) -> None:
            raise Interrupted("interrupted")

    split = Split(tuple(map(str, range(1000))), np.zeros(1000, dtype=np.int64), read)
    with pytest.raises(Interrupted):
        ViewSource(split, View(2, 1.0, "nearest"), memory_bytes=1e9, workers=1).load(Stopped(), "images")
    assert len(begun) < 100
