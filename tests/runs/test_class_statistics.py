"""Statistics of classes: scikit-learn's ridge and nearest centroid are the second formulas."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from remap.errors import RunError, TrainingError
from remap.runs.class_statistics import FILE, ClassStatistics


def drawn(images: int, classes: range, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features in steps of 1/64, whose products and sums float64 holds exactly; labels of some classes."""
    draws = np.random.default_rng(seed)
    return draws.integers(-64, 64, (images, 6)) / 64, draws.integers(classes.start, classes.stop, images)


@pytest.mark.parametrize("penalty", [0.01, 3.0])
def test_ridge_is_that_of_scikit_learn(penalty: float) -> None:
    x, labels = drawn(40, range(4), seed=1)
    expected = Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(x, np.eye(4)[labels]).coef_
    assert np.allclose(ClassStatistics.of(x, labels, 4).ridge(penalty), expected, rtol=1e-9, atol=1e-12)


def test_a_penalty_that_leaves_no_one_solution_is_named() -> None:
    empty = ClassStatistics.of(np.zeros((4, 3)), np.array([0, 1, 0, 1]), 2)
    with pytest.raises(TrainingError, match="too small"):
        empty.ridge(0.0)


def test_prototypes_rank_as_the_cosine_with_class_means() -> None:
    x, labels = drawn(40, range(4), seed=2)
    means = np.stack([x[labels == label].mean(0) for label in range(4)])
    cosine = x @ means.T / np.linalg.norm(x, axis=1, keepdims=True) / np.linalg.norm(means, axis=1)
    found = x @ ClassStatistics.of(x, labels, 4).prototypes().T
    assert np.allclose(found / np.linalg.norm(x, axis=1, keepdims=True), cosine, rtol=1e-12)
    assert not ClassStatistics.of(x, labels, 5).prototypes()[4].any()  # a class without images


def test_sessions_add_up_to_all_images_at_once_to_the_bit() -> None:
    parts = [drawn(20, range(2 * session, 2 * session + 2), seed=session) for session in range(3)]
    added = ClassStatistics.of(*parts[0], 2) + ClassStatistics.of(*parts[1], 4) + ClassStatistics.of(*parts[2], 6)
    x, labels = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    together = ClassStatistics.of(x, labels, 6)
    for name, value in vars(together).items():
        assert np.array_equal(getattr(added, name), value)
    assert np.array_equal(added.ridge(0.5), together.ridge(0.5))


def test_they_are_read_back_for_the_same_features_alone(tmp_path: Path) -> None:
    found = ClassStatistics.of(*drawn(9, range(3), seed=3), 3)
    assert ClassStatistics.load(tmp_path, "a", 3) is None
    found.save(tmp_path, "a")
    back = ClassStatistics.load(tmp_path, "a", 3)
    assert back is not None and all(np.array_equal(getattr(back, name), value) for name, value in vars(found).items())
    assert ClassStatistics.load(tmp_path, "b", 3) is None
    with pytest.raises(RunError, match="does not fit"):
        ClassStatistics.load(tmp_path, "a", 4)
    ClassStatistics(np.array(1.0), np.array(1.0), np.array(1.0)).save(tmp_path, "a")
    with pytest.raises(RunError, match="does not fit"):
        ClassStatistics.load(tmp_path, "a", 3)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot read"):
        ClassStatistics.load(tmp_path, "a", 3)
