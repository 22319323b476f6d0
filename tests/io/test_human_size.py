"""Numbers in words."""

import pytest

from remap.io.human_size import part


@pytest.mark.parametrize(
    ("count", "whole", "expected"),
    [
        (16_384, 693_251, "2.4%"),
        (258, 676_738, "0.038%"),
        (5, 50_000, "0.01%"),
        (0, 10, "0.0%"),
        (7, 7, "100.0%"),
    ],
)
def test_a_small_part_has_two_digits(count: int, whole: int, expected: str) -> None:
    assert part(count, whole) == expected
