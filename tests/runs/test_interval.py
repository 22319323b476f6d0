"""Intervals of shares, against published figures."""

import pytest

from remap.runs.interval import difference, wilson, with_interval


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


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10: 9/10 - 3/10."""
    assert difference(0.9, 0.3, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_an_interval_in_words() -> None:
    """340 of 360: Wilson's bounds by hand are 0.9156 and 0.9637."""
    assert with_interval(340 / 360, 360) == "94.4 % (91.6-96.4)"
