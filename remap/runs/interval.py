"""Intervals of shares of a few images. Imports no torch."""

from math import hypot, sqrt
from statistics import NormalDist
from typing import Any

Z = NormalDist().inv_cdf(0.975)  # of 95 % intervals


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the Wilson score interval (95 %) of a share of ``count`` images (Wilson 1927).

    It holds for few images, and near 0 and 1 too.
    """
    if not count:
        return 0.0, 1.0
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    half = Z / scale * sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    # Of none and of all images, one end is exact, and rounding would miss it.
    return (max(0.0, centre - half) if share > 0 else 0.0), (min(1.0, centre + half) if share < 1 else 1.0)


def difference(first: float, second: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of ``first - second``, two shares of ``count`` images each (Newcombe 1998, method 10).

    The two are taken as independent, which is wider than a paired interval where the same images were answered.
    """
    (low, high), (other_low, other_high) = wilson(first, count), wilson(second, count)
    gap = first - second
    return gap - hypot(first - low, other_high - second), gap + hypot(high - first, second - other_low)


def with_interval(share: float, count: int) -> str:
    """Return a share in words with its interval: "94.4% (92.6-95.8)"."""
    return in_words(share, *wilson(share, count))


def in_words(share: float, low: float, high: float) -> str:
    """Return a share and its interval in words."""
    return f"{share:.1%} ({limits((low, high))})"


def limits(interval: tuple[float, float], digits: int = 1) -> str:
    """Return the ends of an interval of a share in percent: "92.6-95.8"."""
    return "-".join(f"{100 * end:.{digits}f}" for end in interval)


def paired(first_SN: Any, second_SN: Any) -> tuple[float, float, float]:
    """Return the mean difference of two methods on the same seeds and images, and its 95 % interval.

    Seeds and images are both taken as samples, crossed with each other: the two-way random-effects analysis of
    variance that studies of several readers of the same cases use, with its degrees of freedom (Dorfman, Berbaum and
    Metz 1992; Hillis 2007, Statistics in Medicine 26:596). Of one seed, only the images vary: the adjusted Wald
    interval of matched proportions (Agresti and Min 2005, Statistics in Medicine 24:729).

    Args:
        first_SN, second_SN: Whether each method is right, seeds by images.
    """
    import numpy as np  # loads slowly, and only comparisons need it

    gap_SN = np.asarray(first_SN, np.float64) - np.asarray(second_SN, np.float64)
    seeds, images = gap_SN.shape
    mean = float(gap_SN.mean())
    if seeds == 1:
        better, worse, count = (gap_SN > 0).sum() + 0.5, (gap_SN < 0).sum() + 0.5, images + 2
        centre = float(better - worse) / count
        half = Z * sqrt(better + worse - (better - worse) ** 2 / count) / count
        return mean, min(mean, centre - half), max(mean, centre + half)
    by_seed_S, by_image_N = gap_SN.mean(axis=1), gap_SN.mean(axis=0)
    rest_SN = gap_SN - by_seed_S[:, None] - by_image_N + mean
    of_seeds = images * float(by_seed_S.var(ddof=1))
    of_images = seeds * float(by_image_N.var(ddof=1)) if images > 1 else 0.0
    of_rest = float((rest_SN**2).sum()) / max(1, (seeds - 1) * (images - 1))
    # What seeds vary by is expected to be no less than the rest: a smaller mean square of few seeds is chance.
    total = max(of_seeds, of_rest) + max(0.0, of_images - of_rest)
    if not total:
        return mean, mean, mean
    from scipy.stats import t  # loads slowly

    freedom = total**2 / (of_seeds**2 / (seeds - 1)) if of_seeds else np.inf
    half = float(t.ppf(0.975, freedom)) * sqrt(total / (seeds * images))
    return mean, mean - half, mean + half
