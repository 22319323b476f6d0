"""Intervals of shares, against published figures."""

import numpy as np
import pytest
from scipy.stats import t

from remap.runs.interval import Measured, difference, paired, paired_draws, share_of, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3 (Wilson without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("count", [1, 3, 10, 97, 360, 797])
def test_of_all_or_none_of_the_images_one_end_is_exact(count: int) -> None:
    """Wilson's formula with a share of 1: (1 + z^2 / 2n + z^2 / 2n) / (1 + z^2 / n) is 1."""
    assert wilson(1.0, count)[1] == 1.0 and wilson(0.0, count)[0] == 0.0


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10: 9/10 - 3/10."""
    assert difference(share_of(0.9, 10), share_of(0.3, 10)) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_an_interval_in_words() -> None:
    """340 of 360: Wilson's bounds by hand are 0.9156 and 0.9637."""
    assert f"{share_of(340 / 360, 360)}" == "94.4% (91.6-96.4)"


def test_the_paired_interval_is_that_of_crossed_seeds_and_images() -> None:
    """Second formula: mean squares by sums of squares as a table of variance has them, degrees of freedom of Hillis
    2007, Statistics in Medicine 26:596, equation for two modalities.
    """
    draws = np.random.default_rng(0)
    first, second = (draws.random((3, 40)) < draws.random(40) * rate for rate in (1.6, 1.1))
    gap = first.astype(float) - second
    seeds, images = gap.shape
    correction = gap.sum() ** 2 / gap.size
    ss_seeds = (gap.sum(axis=1) ** 2).sum() / images - correction
    ss_images = (gap.sum(axis=0) ** 2).sum() / seeds - correction
    ss_rest = (gap**2).sum() - correction - ss_seeds - ss_images
    ms_seeds, ms_images = ss_seeds / (seeds - 1), ss_images / (images - 1)
    ms_rest = ss_rest / ((seeds - 1) * (images - 1))
    total = max(ms_seeds, ms_rest) + max(ms_images - ms_rest, 0.0)
    half = t.ppf(0.975, total**2 / (ms_seeds**2 / (seeds - 1))) * (total / gap.size) ** 0.5
    assert paired(first, second) == pytest.approx((gap.mean(), gap.mean() - half, gap.mean() + half))


def test_the_paired_interval_of_one_seed_is_the_adjusted_wald() -> None:
    """Agresti and Min 2005, Statistics in Medicine 24:729: half an image is added to each cell of the 2 x 2 table.

    By hand, 6 images right by the first alone, 2 by the second, of 20: (6.5 - 2.5) / 22 = 2 / 11, and the variance
    (9 - 16 / 22) / 22^2 = 0.017092.
    """
    first, second = np.zeros((2, 1, 20), bool)
    first[0, :6] = second[0, 10:12] = True
    half = 1.959964 * 0.017092**0.5
    assert paired(first, second) == pytest.approx((0.2, 2 / 11 - half, 2 / 11 + half), abs=1e-5)
    assert paired(first, first)[0] == 0.0


def test_paired_intervals_hold_the_true_difference() -> None:
    """120 comparisons of 3 seeds and 200 images, drawn from a model with effects of images, of seeds and of both.

    19 of 20 should; with this few seeds, simulations of 2,000 comparisons gave 92 % to 98 %.
    """
    draws, held = np.random.default_rng(1), 0
    for _ in range(120):
        image, seed = draws.normal(0, 1, 200), draws.normal(0, 0.1, (2, 3, 1))
        own = 0.3 * draws.normal(0, 1, (2, 1, 200))  # images that suit one method more
        skill = 1.0 + image + own + seed + 0.3 * draws.normal(0, 1, (2, 3, 200))
        _, low, high = paired(skill[0] > 0, skill[1] > 0)  # alike but for chance: the true difference is 0
        held += low <= 0 <= high
    assert 0.92 <= held / 120 < 1


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_paired_interval_by_draws_is_that_of_a_mean(seeds: int) -> None:
    """Of a mean over 400 images, whose variance over draws is known: variance of the images over their number.

    Seeds add theirs, with Satterthwaite's degrees of freedom; 4,000 draws give half a width within 5 %.
    """
    draws = np.random.default_rng(2)
    gap_SN = draws.normal(0.1, 1, (seeds, 400)) + draws.normal(0, 0.05, (seeds, 1))
    rows_KN = draws.integers(400, size=(4000, 400))
    mean, low, high = paired_draws(gap_SN.mean(1), gap_SN[:, rows_KN].mean(2))
    of_images, of_seeds = gap_SN.mean(0).var() / 400, 0.0 if seeds == 1 else gap_SN.mean(1).var(ddof=1) / seeds
    freedom = np.inf if seeds == 1 else (seeds - 1) * ((of_images + of_seeds) / of_seeds) ** 2
    half = t.ppf(0.975, freedom) * (of_images + of_seeds) ** 0.5
    assert (mean, high - low) == pytest.approx((gap_SN.mean(), 2 * half), rel=0.05)
    assert low < mean < high


def test_the_interval_of_a_difference_takes_any_intervals() -> None:
    """Zou and Donner 2008, by hand: 0.5 less 0.3, the lower side sqrt(0.1^2 + 0.2^2), the upper sqrt(0.3^2 + 0.1^2)."""
    low, high = difference(Measured(0.5, 0.4, 0.8), Measured(0.3, 0.2, 0.5))
    assert (low, high) == pytest.approx((0.2 - 0.05**0.5, 0.2 + 0.1**0.5))
