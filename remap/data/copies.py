"""Images whose files are equal byte for byte, which should not be learned from and evaluated on at once."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from remap.data.fingerprint import Contents
from remap.data.splits import Split
from remap.data.stratify import stratified
from remap.data.thread_pool import threads
from remap.io.human_size import number_of
from remap.progress import Progress

# Files that are looked at between two steps, so that millions do not wait in memory.
CHUNK = 4096


def first_copies(images: Split, size: Callable[[int], int]) -> NDArray[np.int64]:
    """Return for each image the first one of its class with the same content, (N,); itself where it has no copy.

    Only files of equal ``size`` are read. In a class of nothing but copies each image counts for itself, since a split
    needs one on each side.
    """
    indices = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    with threads(8) as pool:
        sizes = [one for chunk in pool.map(lambda chunk: list(map(size, chunk)), indices) for one in chunk]
    alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, kind in enumerate(zip(images.labels.tolist(), sizes, strict=True)):
        alike[kind].append(index)
    candidates = [index for group in alike.values() if len(group) > 1 for index in group]
    contents, first_N, seen = Contents(images), np.arange(len(images)), dict[tuple[int, bytes], int]()
    for start in range(0, len(candidates), CHUNK):
        chunk = candidates[start : start + CHUNK]
        for index, digest in zip(chunk, contents.of(chunk), strict=True):
            first_N[index] = seen.setdefault((int(images.labels[index]), digest), index)
    for label in np.unique(images.labels[first_N != np.arange(len(images))]):
        of_class = np.flatnonzero(images.labels == label)
        if len(np.unique(first_N[of_class])) == 1:
            first_N[of_class] = of_class
    return first_N


def copies_together(images: Split, first_N: NDArray[np.int64], count: int) -> tuple[Split, Split]:
    """Divide images into those with ``count`` of the contents, each class in proportion, and those with the others.

    Args:
        first_N: What ``first_copies`` returned.
    """
    distinct_K = np.unique(first_N)
    learned_K, _ = stratified(images.labels[distinct_K], count)
    learned_N = np.isin(first_N, distinct_K[learned_K])
    return images.take(np.flatnonzero(learned_N)), images.take(np.flatnonzero(~learned_N))


def copies_across(contents: Mapping[str, Contents], progress: Progress) -> str | None:
    """Return in words how many images to evaluate on are copies of training images; None where none is.

    Args:
        contents: By split: train, val, and maybe unlabeled, test and selection.
    """

    def files(*splits: str) -> Iterator[tuple[str, bytes]]:
        for split in splits:
            if split in contents:
                digests = contents[split].complete(progress, f"{split} images")
                yield from zip(contents[split].split.names, map(bytes, digests), strict=True)

    learned = {digest: name for name, digest in files("train", "unlabeled")}
    pairs = [f"{name} is {learned[digest]}" for name, digest in files("val", "test", "selection") if digest in learned]
    if not pairs:
        return None
    shown = ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    found = number_of(len(pairs), "copy of a training image", "copies of training images")
    return f"{found} among the images to evaluate on, which makes figures too good: {shown}"
