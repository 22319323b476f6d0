"""Images that look the same: equal or nearly equal difference hashes.

dHash (Krawetz 2013, "Kind of Like That"): the image in greys, resized to 9 x 8 pixels; one bit for each pair of
neighbours in a row, whether the right one is brighter. Re-encoded, resized and slightly brightened copies keep it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Bits of 64 in which the hashes of two images that look the same may differ.
MOST_BITS = 3
# Bands that the hash is cut into: of more bands than bits that differ, one is equal.
_BANDS = MOST_BITS + 1
# A range of greys below this has nothing to compare.
FLAT = 8


def dhash(image: Image.Image) -> int:
    """Return the 64 bits of an image."""
    greys_8x9 = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits_8x8 = greys_8x9[:, 1:] > greys_8x9[:, :-1]
    return int.from_bytes(np.packbits(bits_8x8).tobytes())


def near_pairs(hashes_N: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Yield all pairs of indices, the smaller one first, whose hashes differ in at most ``MOST_BITS`` bits.

    Two hashes are compared only where one of four bands of 16 bits is equal, which none of those pairs lacks.
    """
    width = 64 // _BANDS
    for band in range(_BANDS):
        values_N = (hashes_N >> np.uint64(band * width)) & np.uint64(2**width - 1)
        order_N = np.argsort(values_N, kind="stable")
        ends = np.flatnonzero(np.diff(values_N[order_N])) + 1
        for group in np.split(order_N, ends):
            for position, first in enumerate(group[:-1].tolist()):
                others = group[position + 1 :]
                differing = hashes_N[others] ^ hashes_N[first]
                bits = np.unpackbits(differing.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
                for second in others[bits <= MOST_BITS].tolist():
                    if not _equal_before(hashes_N[first] ^ hashes_N[second], band, width):
                        yield min(first, second), max(first, second)


def _equal_before(differing: np.uint64, band: int, width: int) -> bool:
    """Return whether an earlier band of two hashes is equal, where the pair was found already."""
    return any(not (int(differing) >> (other * width)) & (2**width - 1) for other in range(band))
