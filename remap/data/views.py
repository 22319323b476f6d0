"""Views: the rectangle of raw uint8 pixels that teacher and student both start from.

Letters: B images, C channels, H and W height and width of the view in pixels.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from remap.data.fast_views import INTERPOLATIONS, fast_view
from remap.data.fingerprint import Contents, ranges
from remap.data.images import BadImage, decode_channels, reason_of
from remap.data.pixels import RGB, Pixels
from remap.data.splits import Split
from remap.data.thread_pool import threads
from remap.errors import DataError
from remap.progress import Progress

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class View:
    """How an image becomes a view: ``crop_pct`` of the largest box of its shape, in the centre, resized to ``size``.

    Attributes:
        size: Side of a square in pixels, or (height, width).
    """

    size: int | tuple[int, int]
    crop_pct: float
    interpolation: str
    pixels: Pixels = RGB

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a view."""
        return (self.pixels.channels, *((self.size, self.size) if isinstance(self.size, int) else self.size))

    @property
    def nbytes(self) -> int:
        """Bytes of a view."""
        return prod(self.shape)

    def read(self, source: bytes | Path | Image.Image) -> NDArray[np.uint8]:
        """Decode an image and return its view, (C, H, W) uint8.

        Raises:
            BadImage: It cannot be read.
        """
        if self.pixels.decode == "fast" and self.interpolation in INTERPOLATIONS:
            return fast_view(source, self.pixels, self.shape, self.crop_pct, self.interpolation, self.apply)
        return self.apply(*decode_channels(source, self.pixels))

    def apply(self, *channels: Image.Image) -> NDArray[np.uint8]:
        """Return the view, (C, H, W) uint8, of an image or of its channels.

        The crop is resized in one go, so a sliver of an image needs no giant in between.
        """
        (_, height, width), image = self.shape, channels[0]
        across = min(image.width, image.height * width / height) * self.crop_pct
        down = min(image.height, image.width * height / width) * self.crop_pct
        left, top = (image.width - across) / 2, (image.height - down) / 2
        box = (left, top, left + across, top + down)
        parts = [np.asarray(one.resize((width, height), FILTERS[self.interpolation], box=box)) for one in channels]
        # Contiguous: for a strided batch a convolution takes another kernel, with other last bits than for the same
        # images held in memory.
        pixels_HWC = parts[0] if parts[0].ndim == 3 else np.dstack(parts)
        return np.array(pixels_HWC.transpose(2, 0, 1), order="C")

    def to_dict(self) -> dict[str, object]:
        pixels = self.pixels.to_dict()
        plain: dict[str, object] = {"size": self.size, "crop_pct": self.crop_pct, "interpolation": self.interpolation}
        return {**plain, "pixels": pixels} if pixels else plain


class ViewSource:
    """Views of a split, decoded by threads; cached in memory when they fit.

    Attributes:
        workers: Threads that decode and augment.
        bad: Reason by index for images that could not be read so far.
        contents: Digests of what was read so far.
    """

    def __init__(
        self,
        split: Split,
        view: View,
        *,
        memory_bytes: float,
        workers: int | None = None,
        contents: Contents | None = None,
    ) -> None:
        self.split, self.view = split, view
        self._bad: dict[int, str] = {}
        self.workers = workers or min(8, os.cpu_count() or 1)
        self._cached: Tensor | None = None
        self._in_memory = self.nbytes <= memory_bytes
        self._lock = threading.Lock()
        self.contents = contents or Contents(split, self.workers)

    @property
    def bad(self) -> dict[int, str]:
        return self._bad

    @property
    def nbytes(self) -> int:
        return len(self.split) * self.view.nbytes

    @property
    def cached_bytes(self) -> int:
        """Bytes that ``load`` caches in memory."""
        return self.nbytes if self._in_memory else 0

    def load(self, progress: Progress, what: str, rank: int = 0, processes: int = 1) -> Sequence[Tensor]:
        """Decode everything once, when it fits in memory; afterwards ``bad`` is complete.

        Returns:
            The memory of the views, in a part for each process: that of ``rank`` is filled here, the others by the
            caller (``remap.distributed.reading.load_together``). Nothing where nothing had to be decoded.
        """
        if not self._in_memory or self._cached is not None:
            return ()
        pixels_NCHW = torch.zeros(len(self.split), *self.view.shape, dtype=torch.uint8)
        parts = ranges(len(self.split), processes)
        with progress.wait(f"reading {what}", len(parts[rank])) as step, threads(self.workers) as pool:
            for index, pixels in zip(parts[rank], pool.map(self._read, parts[rank]), strict=True):
                if pixels is not None:
                    pixels_NCHW[index] = torch.from_numpy(pixels)
                step.advance()
        self._cached = pixels_NCHW
        return [pixels_NCHW[part.start : part.stop] for part in parts]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Return views of some images and the indices that could be read: uint8 (B', C, H, W), int64 (B',)."""
        chosen = np.asarray(indices, dtype=np.int64)
        if self._cached is not None:
            readable = np.asarray([i for i in chosen if i not in self.bad], dtype=np.int64) if self.bad else chosen
            return self._cached.index_select(0, torch.from_numpy(readable)), readable
        with threads(self.workers) as pool:
            views = list(pool.map(self._read, chosen))
        pixels = [view for view in views if view is not None]
        readable = np.asarray([i for i, view in zip(chosen, views, strict=True) if view is not None], dtype=np.int64)
        if not pixels:
            return torch.zeros(0, *self.view.shape, dtype=torch.uint8), readable
        return torch.from_numpy(np.stack(pixels)), readable

    def without_bad(self) -> "ViewSource":
        """Return the same source without the images that could not be read so far."""
        if not self.bad:
            return self
        readable = np.asarray([i for i in range(len(self.split)) if i not in self.bad], dtype=np.int64)
        other = ViewSource(self.split.take(readable), self.view, memory_bytes=0.0, workers=self.workers)
        other._cached = None if self._cached is None else self._cached[torch.from_numpy(readable)]
        other.contents = self.contents.taken(readable)
        return other

    def digests(self, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """Return 16 bytes for the encoded content of each image; see ``Contents``."""
        return self.contents.of(indices)

    def note_bad(self, bad: Mapping[int, str]) -> None:
        """Take over what another process could not read."""
        with self._lock:
            self._bad.update(bad)

    def bad_names(self) -> list[tuple[str, str]]:
        """Return (name, reason) of the images that could not be read so far."""
        return [(self.split.names[index], reason) for index, reason in sorted(self.bad.items())]

    def _read(self, index: int) -> NDArray[np.uint8] | None:
        try:
            return self.view.read(self.contents.read(int(index)))
        except (BadImage, OSError) as error:
            with self._lock:
                self._bad[int(index)] = error.reason if isinstance(error, BadImage) else reason_of(error)
            return None


def listed(files: Sequence[tuple[str, str]]) -> str:
    """Return names with reasons in words; the first five of many."""
    shown = ", ".join(f"{name} ({reason})" for name, reason in files[:5])
    return shown + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def require_readable(source: ViewSource, what: str, skip: bool) -> None:
    """Refuse to evaluate on fewer images than there are, unless the user left bad ones out on purpose.

    Raises:
        DataError: An image of an evaluation split cannot be read.
    """
    if source.bad and not skip:
        raise DataError(
            f"{len(source.bad)} of {len(source.split)} {what} images cannot be read",
            given=listed(source.bad_names()),
            do="repair or remove them, or leave them out with --skip-bad",
        )
