"""Two images made one: mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

Both take raw uint8 pixels and give uint8 pixels, so that every network that looks at the result sees the same image.
Letters: B images, C channels, H and W height and width of the view in pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Numbers in [0, 1) that decide one pair: whether it is mixed, how, in which share, and the centre of the box (2).
DRAWS = 5


def mix(
    images_BCHW: Tensor,
    others_BCHW: Tensor,
    draws_B5: NDArray[np.float64],
    *,
    mixup: float,
    cutmix: float,
    chance: float,
) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner.

    The share lambda of an image follows Beta(a, a) with a = ``mixup`` or ``cutmix``; where both are above 0, half the
    pairs (by chance) are mixed in either way. Partners with the same draws get the same share of themselves.

    Args:
        chance: Probability that a pair is mixed at all.

    Returns:
        The mixed images, uint8, and how much of each is its own, float32 (B,): lambda of mixup; of CutMix, the share
        of pixels outside the box, counted after the box is cut off at the edges.
    """
    which, how, quantile, *centre = draws_B5.T
    mixed = which < chance
    boxed = np.full_like(mixed, cutmix > 0) & ((how < 0.5) | (mixup <= 0))
    share = np.ones(len(draws_B5), dtype=np.float32)
    result = images_BCHW.clone()
    images, others = result.numpy(), others_BCHW.numpy()
    # One by one, in the processor's cache: several times as fast as all at once.
    blended = np.flatnonzero(mixed & ~boxed)
    for index, one in zip(blended, _beta(mixup, quantile[blended]), strict=True):
        share[index] = one
        image, other = images[index].astype(np.float32), others[index].astype(np.float32)
        images[index] = np.rint(image * share[index] + other * (1 - share[index]))
    boxed, size = np.flatnonzero(mixed & boxed), np.array(images.shape[2:])
    centres = np.stack(centre, 1)[boxed]
    for index, one, point in zip(boxed, _beta(cutmix, quantile[boxed]), centres, strict=True):
        rows, columns = _box(size, one, point)
        images[index, :, rows, columns] = others[index, :, rows, columns]
        share[index] = 1.0 - (rows.stop - rows.start) * (columns.stop - columns.start) / size.prod()
    return result, torch.from_numpy(share)


def _beta(a: float, quantile_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Beta(a, a) by its quantile function, so that one number in [0, 1) decides it."""
    from scipy.special import betaincinv

    return betaincinv(a, a, quantile_B) if len(quantile_B) else quantile_B


def _box(size: NDArray[np.int64], share: float, centre_2: NDArray[np.float64]) -> tuple[slice, slice]:
    """Return the rows and columns that come from the partner.

    They are sqrt(1 - lambda) of each side, about a uniformly drawn point, cut off at the edges of the image.
    """
    half = size * np.sqrt(1.0 - share) / 2
    low = np.clip(np.rint(centre_2 * size - half), 0, size).astype(int)
    high = np.clip(np.rint(centre_2 * size + half), 0, size).astype(int)
    return slice(low[0], high[0]), slice(low[1], high[1])
