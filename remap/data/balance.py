"""Images of each class: which have none, and how sizes are brought nearer, in the loss or by how often one is drawn."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from remap.data import keyed_random
from remap.data.splits import ImageData, Split


def class_weights(labels_N: NDArray[np.int64], classes: int, power: float) -> NDArray[np.float64]:
    """Return what an image of each class counts, (C,): n^-power for n images, scaled to a mean of 1 over all images.

    Args:
        labels_N: Of the images; those without a label (-1) count nothing.
    """
    counts_C = np.bincount(labels_N[labels_N >= 0], minlength=classes).astype(np.float64)
    weights_C = np.where(counts_C > 0, np.maximum(counts_C, 1.0) ** -power, 0.0)
    return weights_C * (counts_C.sum() / (counts_C @ weights_C))


def answer_weights(labels_NC: NDArray[np.int8], power: float) -> NDArray[np.float64]:
    """Return what a yes counts beside a no, (C,): (images without the class / images with it)^power.

    It is 1 where one of them is 0. Images without labels (-1) count nothing.
    """
    known_KC = labels_NC[labels_NC[:, 0] >= 0]
    with_C = (known_KC == 1).sum(axis=0)
    without_C = len(known_KC) - with_C
    return np.where(with_C * without_C > 0, without_C / np.maximum(with_C, 1), 1.0) ** power


def draw(seed: int, epoch: int, expected_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the N images of an epoch, in order; image i is among them floor or ceil of ``expected_N[i]`` times.

    Systematic sampling: N evenly spaced marks on a line on which each image, in random order, takes up the length of
    its expected number. A function of (seed, epoch).

    Args:
        expected_N: How often each image is expected; they sum to N.
    """
    images = len(expected_N)
    line_N = keyed_random.permutation(seed, epoch, images)
    start = keyed_random.uniform(seed, epoch, np.asarray([images]), 1, keyed_random.DRAW)[0, 0]
    ends_N = np.cumsum(expected_N[line_N])
    at_N = np.searchsorted(ends_N, (start + np.arange(images)) * (ends_N[-1] / images), side="right")
    drawn_N = line_N[np.minimum(at_N, images - 1)]
    return drawn_N[np.argsort(keyed_random.keys(seed, epoch, np.arange(images), keyed_random.DRAW), kind="stable")]


def classes_only_in(splits: Iterable[Split], other: Split, data: ImageData) -> list[str]:
    """Return the classes of the data that have an image in one of the splits and none in another one."""
    first, second = [data.count(split) for split in splits], data.count(other)
    return [name for at, name in enumerate(data.classes) if any(one[at] for one in first) and not second[at]]
