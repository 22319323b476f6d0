"""Labelled images and how they are divided into those to learn from and those to check on."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from remap.data import keyed


@dataclass(frozen=True)
class Split:
    """Images with labels. ``read(i)`` gives encoded bytes of image i; ``names[i]`` is what messages call it."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Split":
        """The split of some of its images."""
        chosen = np.asarray(indices, dtype=np.int64)
        read = self.read
        return Split(tuple(self.names[i] for i in chosen), self.labels[chosen], lambda i: read(int(chosen[i])))


@dataclass(frozen=True)
class ImageData:
    """What a run learns from and is measured on.

    Attributes:
        classes: Names in label order (sorted).
        skipped: Files left out before training, with the reason.
        split_rule: How train and val came about, in words.
    """

    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None = None
    skipped: tuple[tuple[str, str], ...] = field(default=())
    split_rule: str = ""

    def fingerprint(self) -> str:
        """Hash of class names, file names, labels and order."""
        digest = hashlib.sha256(_bytes_of(self.classes))
        for split in (self.train, self.val, self.test):
            if split is not None:
                digest.update(_bytes_of(split.names) + split.labels.tobytes())
        return digest.hexdigest()


def _bytes_of(names: Iterable[str]) -> bytes:
    """File names need not be UTF-8; Python keeps stray bytes as surrogates."""
    return "\0".join(names).encode(errors="surrogatepass")


def stratified(labels: NDArray[np.int64], first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide into ``first`` images and the rest, each class in proportion (largest remainder), the same every time.

    Each class of two images or more is on both sides, as far as ``first`` allows.
    """
    counts = np.bincount(labels)
    exact = counts * (first / len(labels))
    low = np.minimum(counts, 1)
    high = np.maximum(counts - 1, low)
    if not low.sum() <= first <= high.sum():
        low, high = np.zeros_like(counts), counts
    share = np.clip(np.floor(exact).astype(int), low, high)
    while (step := int(np.sign(first - share.sum()))) != 0:
        room = share < high if step > 0 else share > low
        share[np.argmax(np.where(room, (exact - share) * step, -np.inf))] += step
    order = np.argsort(keyed.keys(0, 0, np.arange(len(labels)), keyed.SPLIT), kind="stable")
    chosen = np.concatenate([order[labels[order] == label][: share[label]] for label in range(len(counts))])
    return np.sort(chosen), np.setdiff1d(np.arange(len(labels)), chosen)
