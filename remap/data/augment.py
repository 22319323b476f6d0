"""Augmentation of raw pixels: what is done to an image in each of its views.

The draws of a view decide its pixels, and are part of the key of a cached teacher output (``remap.cache``).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.data import keyed_random
from remap.data.views import ViewSource

# Random numbers for one image in one view: shift down, shift right, mirror. Another number of them gives every draw
# another value, so cached teacher outputs of augmented views are computed again.
DRAWS = 3


def draws(kind: str, seed: int, view: int, indices_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the numbers in [0, 1) behind a view of some images, (B, DRAWS); (B, 0) for "none"."""
    return keyed_random.uniform(seed, view, indices_B, 0 if kind == "none" else DRAWS)


def augmented_view(
    source: ViewSource, kind: str, seed: int, view: int, indices: Sequence[int] | NDArray[np.int64]
) -> tuple[Tensor, NDArray[np.int64]]:
    """Return the images that training sees in view number ``view``, and the indices that could be read.

    Shapes as ``ViewSource.batch``.
    """
    images, readable = source.batch(indices)
    return augmented(images, kind, draws(kind, seed, view, readable)), readable


def augmented(images_BCHW: Tensor, kind: str, draws_BN: NDArray[np.float64]) -> Tensor:
    """Return images that are shifted by up to an eighth of each side (edges filled with zeros) and mirrored.

    Args:
        images_BCHW: uint8.
        kind: "none", "shift" or "shift_flip".
        draws_BN: ``draws``.
    """
    if kind == "none" or not len(images_BCHW):
        return images_BCHW
    channels, height, width = images_BCHW.shape[1:]
    pad = np.array([height // 8, width // 8])
    images, result = images_BCHW.numpy(), torch.empty_like(images_BCHW)
    offsets = (draws_BN[:, :2] * (2 * pad + 1)).astype(np.int64)
    framed = np.zeros((channels, height + 2 * pad[0], width + 2 * pad[1]), dtype=np.uint8)
    mirrored = (draws_BN[:, 2] < 0.5) & (kind == "shift_flip")
    # One by one, in the processor's cache: several times as fast as all at once.
    for index, (row, column) in enumerate(offsets):
        inside = framed[:, pad[0] : pad[0] + height, pad[1] : pad[1] + width]
        inside[:] = images[index, :, :, :: -1 if mirrored[index] else 1]
        result[index] = torch.from_numpy(framed[:, row : row + height, column : column + width])
    return result
