"""The toy data source: `--data toy` is twelve red, green and blue images, and nine more to evaluate on."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from remap.data.sources import Source
from remap.data.splits import ImageData, Split

COLOURS = ("blue", "green", "red")


class Colours(Source):
    """Noise with one raised channel, drawn from a fixed seed: the same bytes on every machine and in every run."""

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        """Return both splits; `val_source` and `val_fraction` do not apply."""
        return ImageData(word, COLOURS, _split("train", 12, 1), _split("val", 9, 2), split_rule="drawn apart")


def _split(name: str, count: int, seed: int) -> Split:
    labels = np.arange(count, dtype=np.int64) % len(COLOURS)
    names = tuple(f"{name}/{COLOURS[label]}/{index}.png" for index, label in enumerate(labels))
    return Split(names, labels, _reader(labels, seed))


def _reader(labels: np.ndarray, seed: int) -> Callable[[int], bytes]:
    def read(index: int) -> bytes:
        pixels = np.random.default_rng((seed, index)).integers(0, 120, (16, 16, 3))
        pixels[..., 2 - labels[index]] += 110
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
        return file.getvalue()

    return read
