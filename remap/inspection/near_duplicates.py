"""Images that look the same: equal or nearly equal difference hashes, and greys that confirm it.

dHash (Krawetz 2013, "Kind of Like That"): the image in greys, resized to 9 x 8 pixels; one bit for each pair of
neighbours in a row, whether the right one is brighter. Re-encoded, resized and slightly brightened copies keep it, and
so do many other pictures of one thing on one background: digits, clothes. Their greys tell them apart.

Letters: N images, G of them with one hash, U distinct hashes, K greys of an image.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Bits of 64 in which the hashes of two images that look the same may differ.
MOST_BITS = 3
# Bits of the six bands that the hash is cut into: three that differ leave three that are equal.
_BANDS = [sum(1 << bit for bit in range(band, 64, 2 * MOST_BITS)) for band in range(2 * MOST_BITS)]
# Pixels on a side of the greys, and their least correlation: of photographs of clothes with like hashes it is 0.975 at
# most, of one that was made brighter, resized and compressed 0.996 at least.
SIDE, LEAST_ALIKE = 16, 0.995
# A range of greys below this has nothing to compare.
FLAT = 8


def dhash(image: Image.Image) -> int:
    """Return the 64 bits of an image."""
    greys_8x9 = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits_8x8 = greys_8x9[:, 1:] > greys_8x9[:, :-1]
    return int.from_bytes(np.packbits(bits_8x8).tobytes())


def small_greys(image: Image.Image) -> bytes:
    """Return the greys of an image in 16 x 16 pixels."""
    return image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def near_pairs(hashes_N: NDArray[np.uint64], greys_NK: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Yield pairs of indices, the smaller one first, of images that look the same.

    Their hashes differ in at most ``MOST_BITS`` bits, and their greys correlate by ``LEAST_ALIKE``. Of images with
    equal hashes each is paired with the first one that it looks like, and only such firsts with those of other hashes:
    of a thousand frames of one scene there are not half a million pairs.

    Banded hashing (Manku et al. 2007, "Detecting near-duplicates for web crawling"): of six bands of bits, three are
    equal in each of those pairs. For each of the 20 choices of three, hashes are sorted by these bits, and those with
    equal ones are compared: n log n, as long as few images agree in half of their hash and are not alike.
    """
    distinct_U, of_N = np.unique(hashes_N, return_inverse=True)
    groups = np.split(np.argsort(of_N, kind="stable"), np.cumsum(np.bincount(of_N))[:-1])
    for at, group_G in enumerate(groups):
        first_G = np.ones(len(group_G), bool)
        units_GK = _units(greys_NK[group_G]) if len(group_G) > 1 else greys_NK[:0]
        for one in range(len(group_G) - 1):
            if first_G[one]:
                later = first_G[one + 1 :] & (units_GK[one + 1 :] @ units_GK[one] >= LEAST_ALIKE)
                alike = one + 1 + np.flatnonzero(later)
                first_G[alike] = False
                yield from ((int(group_G[one]), int(other)) for other in group_G[alike])
        groups[at] = group_G[first_G]
    for first, second in _near_distinct(distinct_U):
        few, many = sorted((groups[first], groups[second]), key=len)
        units_GK = _units(greys_NK[many])
        for one in few.tolist():
            for other in many[units_GK @ _units(greys_NK[[one]])[0] >= LEAST_ALIKE].tolist():
                yield min(one, other), max(one, other)


def _units(greys_GK: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return vectors of length 1 whose products are the correlations; 0 for greys that are all equal."""
    centred_GK = greys_GK - greys_GK.mean(axis=1, keepdims=True, dtype=np.float32)
    return centred_GK / np.maximum(np.linalg.norm(centred_GK, axis=1, keepdims=True), 1e-6)


def _near_distinct(hashes_U: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Return the pairs of distinct hashes."""
    codes = [np.zeros(0, np.int64)]
    for bands in combinations(_BANDS, MOST_BITS):
        masked_U = hashes_U & np.uint64(sum(bands))
        order_U = np.argsort(masked_U)
        masked_U, starts, step = masked_U[order_U], np.arange(len(order_U)), 1
        while len(starts := starts[starts + step < len(order_U)]):
            starts = starts[masked_U[starts] == masked_U[starts + step]]  # further ones are equal only if nearer are
            ends = np.stack([order_U[starts], order_U[starts + step]])
            differing = hashes_U[ends[0]] ^ hashes_U[ends[1]]
            bits = np.unpackbits(differing.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
            low, high = np.sort(ends[:, bits <= MOST_BITS], axis=0)
            codes.append(low * len(hashes_U) + high)
            step += 1
    return [divmod(code, len(hashes_U)) for code in np.unique(np.concatenate(codes)).tolist()]
