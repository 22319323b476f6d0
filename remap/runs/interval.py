"""Intervals of shares of a few images. Imports no torch."""

from math import hypot, sqrt
from statistics import NormalDist

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
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(first: float, second: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of ``first - second``, two shares of ``count`` images each (Newcombe 1998, method 10).

    The two are taken as independent, which is wider than a paired interval where the same images were answered.
    """
    (low, high), (other_low, other_high) = wilson(first, count), wilson(second, count)
    gap = first - second
    return gap - hypot(first - low, other_high - second), gap + hypot(high - first, second - other_low)


def with_interval(share: float, count: int) -> str:
    """Return a share in words with its interval: "94.4 % (92.6-95.8)"."""
    low, high = wilson(share, count)
    return f"{100 * share:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
