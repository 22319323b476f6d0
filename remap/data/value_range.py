"""Find the range of values in pictures of more than 8 bits: 12 bits in 16, reflectance, signed values of CT."""

import numpy as np

from remap.data import keyed_random
from remap.data.images import ALWAYS_8_BITS, wide_values
from remap.data.pixels import Pixels
from remap.data.splits import Split
from remap.data.thread_pool import threads

# How many training images are looked at, how many pixels of each, and the share of each that may lie outside at
# either end: hot pixels and dead ones.
MOST_IMAGES, MOST_VALUES, TAIL = 256, 2**20, 0.001
# What values mean where they use more than half of it: shares of white, 8 bits, 16 bits.
FULL_RANGES = (1.0, 255.0, 65535.0)


def find_value_range(split: Split, pixels: Pixels, workers: int | None = None) -> tuple[float, float] | None:
    """Return the values of training images that become 0 and 255, the same for the same images; None for 8 bits.

    A range of a type (``FULL_RANGES``) of which more than half is used is taken as a whole.
    """
    candidates = [index for index, name in enumerate(split.names) if not name.lower().endswith(ALWAYS_8_BITS)]
    chosen = keyed_random.permutation(0, 0, len(candidates))[:MOST_IMAGES]
    with threads(workers or 4) as pool:
        found = [ends for ends in pool.map(lambda at: _ends(split, candidates[at], pixels), chosen) if ends is not None]
    if not found:
        return None
    low, high = min(low for low, _ in found), max(high for _, high in found)
    full = next((top for top in FULL_RANGES if top / 2 < high <= top), None)
    if low >= 0 and full is not None:
        return 0.0, full
    return low, high if high > low else low + 1.0


def _ends(split: Split, index: int, pixels: Pixels) -> tuple[float, float] | None:
    """Return the values that all but ``TAIL`` of an image's lie between; None for 8 bits and what cannot be read."""
    try:
        values = wide_values(split.read(index), pixels)
    except OSError:  # said when it is decoded
        return None
    if values is None:
        return None
    flat = values.values_HWC.reshape(-1)
    flat = flat[:: -(-len(flat) // MOST_VALUES)]
    if not np.isfinite(flat).all():
        return None
    low, high = np.quantile(flat, (TAIL, 1 - TAIL), method="nearest")
    return float(low), float(high)
