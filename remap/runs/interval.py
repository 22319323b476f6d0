"""Intervals of shares of a few images. Imports no torch."""

from math import hypot, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

Z = NormalDist().inv_cdf(0.975)  # of 95 % intervals


class Measured(NamedTuple):
    """A figure of some images, from 0 to 1, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return in_words(*self)


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


def share_of(share: float, count: int) -> Measured:
    """Return a share of ``count`` images with its interval."""
    return Measured(share, *wilson(share, count))


def difference(first: Measured, second: Measured) -> tuple[float, float]:
    """Return the 95 % interval of ``first - second`` from the intervals of both.

    Of shares it is Newcombe's (1998, method 10), of any figure that of Zou and Donner (2008, Statistics in Medicine
    27:1693). The two are taken as independent, which is wider than a paired interval where the same images were
    answered.
    """
    gap = first.value - second.value
    below, above = first.value - first.low, first.high - first.value
    return gap - hypot(below, second.high - second.value), gap + hypot(above, second.value - second.low)


def in_words(share: float, low: float, high: float) -> str:
    """Return a share and its interval in words: "94.4% (92.6-95.8)"."""
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


def paired_draws(gap_S: Any, gap_SK: Any) -> tuple[float, float, float]:
    """Return what ``paired`` does, of figures that are not a mean over images, such as mAP: by the bootstrap.

    Of several seeds, the variances of seeds and of images are added, with the degrees of freedom of Satterthwaite 1946;
    that of images has many. Of one seed, the interval is of percentiles (Efron 1979).

    Args:
        gap_S: Difference of the two methods for each seed.
        gap_SK: The same on K resamples of the images, each of which is the same one for both methods and all seeds.
    """
    import numpy as np

    mean, of_draws_K = float(np.mean(gap_S)), np.mean(gap_SK, axis=0)
    if len(gap_S) == 1:
        low, high = map(float, np.percentile(of_draws_K, (2.5, 97.5)))
        return mean, min(mean, low), max(mean, high)
    of_seeds = float(np.var(gap_S, ddof=1)) / len(gap_S)
    total = of_seeds + float(np.var(of_draws_K, ddof=1))
    if not total:
        return mean, mean, mean
    from scipy.stats import t

    freedom = (len(gap_S) - 1) * (total / of_seeds) ** 2 if of_seeds else np.inf
    half = float(t.ppf(0.975, freedom)) * sqrt(total)
    return mean, mean - half, mean + half
