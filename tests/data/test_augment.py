"""Augmentation: the pixels against a second formula, and the draws that caches of teacher outputs are keyed by."""

import hashlib

import numpy as np
import pytest
import torch

from remap.cache.output_store import row_digests
from remap.data import augment, keyed_random
from remap.data.augment import augmented
from remap.data.augmentation import PRESETS

# Recorded by version 0.1: the digests of two images (bytes 0 and 7) in views 0 and 2 of seed 3.
FIXED = ("8350c981b23444dbdc3d0c7a75ba2402", "608c4cff5d23bfc715c7a4dd63313626")
RECORDED = {
    ("none", 0): FIXED,
    ("none", 2): FIXED,
    ("shift", 0): ("09faaa1b518ff2a533db7972b58a4c42", "efbab4d06b0d2333db94e0a22d8d81c7"),
    ("shift", 2): ("b5f6e6f68d6fe56175ac565a02b30e38", "84ecafc96aebdc12a635144bedb83971"),
    ("shift_flip", 0): ("09faaa1b518ff2a533db7972b58a4c42", "efbab4d06b0d2333db94e0a22d8d81c7"),
    ("shift_flip", 2): ("b5f6e6f68d6fe56175ac565a02b30e38", "84ecafc96aebdc12a635144bedb83971"),
}


@pytest.mark.parametrize(("kind", "view"), RECORDED)
def test_teacher_outputs_that_were_cached_earlier_stay_valid(kind: str, view: int) -> None:
    """A cached output is found by the digest of its image and of the draws behind its view."""
    indices = np.asarray([0, 7])
    files = [hashlib.blake2b(bytes([index]), digest_size=16).digest() for index in indices]
    digests = row_digests(files, augment.draws(PRESETS[kind], 3, view, indices))
    assert tuple(row.tobytes().hex() for row in digests) == RECORDED[kind, view]


def by_hand(image_CHW: np.ndarray, kind: str, draws: np.ndarray) -> np.ndarray:
    """One picture, pixel by pixel: mirror if the third draw is below one half, then move within a black frame."""
    _, height, width = image_CHW.shape
    pad = height // 8
    down, right = (int(draw * (2 * pad + 1)) - pad for draw in draws[:2])
    result = np.zeros_like(image_CHW)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + down, x + right
            if 0 <= from_y < height and 0 <= from_x < width:
                mirrored = kind == "shift_flip" and draws[2] < 0.5
                result[:, y, x] = image_CHW[:, from_y, width - 1 - from_x if mirrored else from_x]
    return result


@pytest.mark.parametrize("kind", ["none", "shift", "shift_flip"])
@pytest.mark.parametrize("size", [7, 8, 17])
def test_augmentation_pixel_by_pixel(kind: str, size: int) -> None:
    images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = keyed_random.uniform(1, 0, np.arange(12), 3)
    draws[0], draws[1] = (0.0, 0.0, 0.0), (1 - 2**-53, 1 - 2**-53, 0.5)
    found = augmented(images, PRESETS[kind], draws)
    expected = [
        image if kind == "none" else by_hand(image, kind, d) for image, d in zip(images.numpy(), draws, strict=True)
    ]
    assert found.dtype == torch.uint8 and (found.numpy() == np.stack(expected)).all()


def test_shifts_reach_both_ends_and_half_the_pictures_are_mirrored() -> None:
    """An eighth of 16 is 2, so five places each way: of 4000 draws 800 each (deviation 25), 2000 mirrored (32)."""
    draws = keyed_random.uniform(0, 0, np.arange(4000), 3)
    for column in draws.T[:2]:
        assert np.abs(np.bincount((column * 5).astype(int)) - 800).max() < 5 * 25.3
    assert abs((draws[:, 2] < 0.5).sum() - 2000) < 5 * 31.7
    assert augmented(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), PRESETS["shift"], draws[:0]).shape == (0, 3, 16, 16)
