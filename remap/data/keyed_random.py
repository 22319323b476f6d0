"""Randomness as a function: numbers that depend on (seed, epoch, image index) and on nothing else.

The order of images, their augmentation and their dropout are then the same for any number of workers and processes
and after any restart, and no generator state has to be saved.
"""

import numpy as np
from numpy.typing import NDArray

# One number for each use, so that order, augmentation and dropout draw from unrelated streams.
ORDER, AUGMENT, DROPOUT, SPLIT, STEP, MIX, DRAW, TEXT = 1, 2, 3, 4, 5, 6, 7, 8


def keys(seed: int, epoch: int, indices_B: NDArray[np.int64], stream: int) -> NDArray[np.uint64]:
    """Return one 64-bit key for each image index, shape (B,)."""
    with np.errstate(over="ignore"):
        # Shifted, so that no seed looks like a stream: else seed 1's stream 2 would be seed 2's stream 1.
        state = _splitmix(np.asarray([seed], dtype=np.uint64) << np.uint64(32))
        for value in (stream, epoch):
            state = _splitmix(state ^ _splitmix(np.asarray([value], dtype=np.uint64)))
        return _splitmix(state ^ _splitmix(indices_B.astype(np.uint64)))


def uniform(
    seed: int, epoch: int, indices_B: NDArray[np.int64], draws: int, stream: int = AUGMENT
) -> NDArray[np.float64]:
    """Return numbers in [0, 1), shape (B, draws)."""
    base = keys(seed, epoch, indices_B, stream)[:, None]
    with np.errstate(over="ignore"):
        bits = _splitmix(base + np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pairs(one_B: NDArray[np.int64], other_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one number for each pair of image indices (below 2**31), in either order."""
    return (np.minimum(one_B, other_B) << np.int64(32)) | np.maximum(one_B, other_B)


def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return an order of ``count`` images, drawn by sorting their keys."""
    return np.argsort(keys(seed, epoch, np.arange(count), ORDER), kind="stable")


def step_seed(seed: int, epoch: int, step: int) -> int:
    """Return a seed for torch's own generator in one training step (layers of a fully tuned backbone draw from it)."""
    return int(keys(seed, epoch, np.asarray([step]), STEP)[0] >> np.uint64(1))


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the output function of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
