"""Figures of several sessions, by hand from their definitions in the papers that the functions name."""

import pytest

from remap.runs.session_figures import figures, is_matrix


def test_figures_by_hand() -> None:
    found = figures([[1.0], [0.5, 0.75], [0.625, 0.25, 0.5]], same_classes=False)
    assert found == {
        "last": pytest.approx((0.625 + 0.25 + 0.5) / 3),
        "average": pytest.approx((1.0 + 0.625 + (0.625 + 0.25 + 0.5) / 3) / 3),
        "forgetting": pytest.approx(((1.0 - 0.625) + (0.75 - 0.25)) / 2),  # the best before, not only the first
        "backward_transfer": pytest.approx(((0.625 - 1.0) + (0.25 - 0.75)) / 2),
        "forward_transfer": None,
    }


def test_sessions_of_the_same_classes_have_a_forward_transfer() -> None:
    assert figures([[1.0, 0.5], [1.0, 0.75, 0.25], [1.0, 1.0, 1.0]], same_classes=True)["forward_transfer"] == 0.375


def test_what_could_not_be_measured_is_left_out() -> None:
    found = figures([[None], [None, 0.75], [None, 0.5, 0.25]], same_classes=False)
    assert found["last"] == 0.375 and found["forgetting"] == 0.25
    assert figures([[0.5], [None, None]], same_classes=False)["last"] is None


def test_a_matrix_from_a_file_is_checked() -> None:
    assert is_matrix([[1.0], [None, 0.5, 0.25]]) and is_matrix([])
    assert not any(map(is_matrix, [None, [1.0], [[]], [[2.0]], [["1"]], [[True]], [[1.0], [0.5]], [[1, 1, 1]]]))
