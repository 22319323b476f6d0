"""Two images made one: mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

Both take raw uint8 pixels and give uint8 pixels, so that every network that looks at the result sees the same image.
Letters: B images, V side of the view in pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Numbers in [0, 1) that decide one pair: whether it is mixed, how, by which share, and the place of the box (2).
DRAWS = 5


def mix(
    images_B3VV: Tensor,
    others_B3VV: Tensor,
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
    share = np.ones(len(draws_B5))
    images_B3VV = images_B3VV.clone()
    blended = np.flatnonzero(mixed & ~boxed)
    if len(blended):
        share[blended] = _beta(mixup, quantile[blended])
        images_B3VV[blended] = _blend(images_B3VV[blended], others_B3VV[blended], share[blended])
    boxed = np.flatnonzero(mixed & boxed)
    if len(boxed):
        size = images_B3VV.shape[-1]
        inside_BVV = _boxes(size, _beta(cutmix, quantile[boxed]), *(place[boxed] for place in centre))
        share[boxed] = 1.0 - inside_BVV.sum((1, 2)) / size**2
        inside = torch.from_numpy(inside_BVV)[:, None]
        images_B3VV[boxed] = torch.where(inside, others_B3VV[boxed], images_B3VV[boxed])
    return images_B3VV, torch.from_numpy(share.astype(np.float32))


def _beta(a: float, quantile_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """Beta(a, a) by its quantile function, so that one number in [0, 1) decides it."""
    from scipy.special import betaincinv

    return betaincinv(a, a, quantile_B)


def _blend(images_B3VV: Tensor, others_B3VV: Tensor, share_B: NDArray[np.float64]) -> Tensor:
    share = torch.from_numpy(share_B.astype(np.float32))[:, None, None, None]
    return (images_B3VV * share + others_B3VV * (1.0 - share)).round().clamp(0, 255).to(torch.uint8)


def _boxes(size: int, share_B: NDArray[np.float64], *centre_2B: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which pixels come from the partner, (B, V, V): a square of V sqrt(1 - lambda) about a point drawn evenly, cut
    off at the edges of the image."""
    half = size * np.sqrt(1.0 - share_B) / 2
    pixels = np.arange(size)
    rows, columns = (
        (pixels >= np.rint(place * size - half)[:, None]) & (pixels < np.rint(place * size + half)[:, None])
        for place in centre_2B
    )
    return rows[:, :, None] & columns[:, None, :]
