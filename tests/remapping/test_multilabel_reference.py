"""Losses of several classes an image, against the closed form in float64: each class is a Bernoulli variable."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remap.pipeline.objective import loss_class
from remap.recipe.named import LossSpec
from remap.remapping.labels import Labels
from remap.remapping.signals import Signals

DRAWS = np.random.default_rng(0)
STUDENT, TEACHER = 3 * DRAWS.standard_normal((2, 6, 4))
SETS = DRAWS.integers(0, 2, (6, 4)).astype(np.int8)


def value(name: str, labels: Labels, **options: Any) -> float:
    kind = loss_class(LossSpec(name=name), multilabel=True)
    term = kind(None, kind.Config(**options))  # type: ignore[arg-type]
    target = term.target(Signals(torch.tensor(TEACHER))) if term.uses_teacher else {}
    return float(term(Signals(torch.tensor(STUDENT)), target, labels))


def sets(rows: np.ndarray = SETS, **fields: Any) -> Labels:
    return Labels(torch.tensor(rows), **fields)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def cross_entropy(wanted: np.ndarray) -> np.ndarray:
    p = sigmoid(STUDENT)
    return -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).mean(axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ce_is_a_binary_cross_entropy_a_class(smoothing: float) -> None:
    wanted = SETS * (1 - smoothing) + smoothing / 2
    expected = cross_entropy(wanted).mean()
    assert value("ce", sets(), label_smoothing=smoothing) == pytest.approx(expected, rel=1e-6)


def test_a_mixed_image_wants_the_mixed_sets() -> None:
    other, share = SETS[::-1].copy(), np.linspace(0.1, 0.9, 6)
    labels = sets(other_B=torch.tensor(other), share_B=torch.tensor(share, dtype=torch.float32))
    expected = cross_entropy(share[:, None] * SETS + (1 - share[:, None]) * other).mean()
    assert value("ce", labels) == pytest.approx(expected, rel=1e-6)


def test_images_without_labels_count_nothing() -> None:
    rows = SETS.copy()
    rows[3:] = -1
    assert value("ce", sets(rows, labeled=0.5)) == pytest.approx(cross_entropy(SETS)[:3].mean(), rel=1e-6)


def test_a_yes_counts_the_weight_of_its_class() -> None:
    weights, p = np.array([0.5, 1.0, 3.0, 9.0]), sigmoid(STUDENT)
    expected = -(weights * SETS * np.log(p) + (1 - SETS) * np.log(1 - p)).mean()
    assert value("ce", sets(weights_C=torch.tensor(weights))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_kl_of_each_class_times_the_square_of_the_temperature(temperature: float) -> None:
    t, s = sigmoid(TEACHER / temperature), sigmoid(STUDENT / temperature)
    kl = t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))
    assert value("kd", sets(), temperature=temperature) == pytest.approx(kl.mean() * temperature**2, rel=1e-5)


def test_kd_stays_finite_and_is_zero_between_equals() -> None:
    from remap.remapping.knowledge.logits.multilabel import bernoulli_kl

    large: Tensor = torch.tensor([[90.0, -90.0]])
    assert float(bernoulli_kl(large, large, 1.0)) == 0.0
    assert float(bernoulli_kl(-large, large, 1.0)) == pytest.approx(90.0), "log of the odds where the teacher is sure"
