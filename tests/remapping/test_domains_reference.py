"""Losses between two domains against formulas of their papers, written a second way in numpy float64."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from remap.remapping import LOSSES
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals

# For test_losses_conformance.py, which explains the keys.
CONFORMANCE: dict[str, dict[str, Any]] = {"mean_teacher": {"base": {"threshold": 0.0}}}
# Six images with labels and five without, in no order.
MIXED = Labels(torch.tensor([-1, 0, 2, -1, 1, 1, -1, -1, 0, 2, -1]), labeled=6 / 11)
SOURCE, TARGET = [1, 2, 4, 5, 8, 9], [0, 3, 6, 7, 10]


def value(name: str, pair: Pair, student: Signals, labels: Labels = MIXED, target: Any = None, **options: Any) -> float:
    kind = LOSSES.load(name)
    return kind(pair, kind.Config(**options))(student, target or {}, labels).item()


@pytest.fixture
def features() -> Signals:
    """Domains of unlike means and covariances, three channels wide apart."""
    pooled = torch.randn(11, 4) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    pooled[TARGET] = pooled[TARGET] * 1.5 + 1.0
    return Signals(torch.zeros(11, 3), pooled)


def test_coral(pair: Pair, features: Signals) -> None:
    # Source: Sun and Saenko 2016, Eq. 1 to 3, entry by entry as sums over pairs of channels.
    x, total = features.pooled_BD.double().numpy(), 0.0
    for i in range(4):
        for j in range(4):
            one, other = (
                sum((x[n, i] - x[rows, i].mean()) * (x[n, j] - x[rows, j].mean()) for n in rows) / (len(rows) - 1)
                for rows in (SOURCE, TARGET)
            )
            total += (one - other) ** 2
    assert value("coral", pair, features) == pytest.approx(total / (4 * 4**2), rel=1e-5)


def test_mmd(pair: Pair, features: Signals) -> None:
    # Source: Long et al. 2015, Eq. 1, over pairs one by one; the median of numpy is of two middle ones, torch's the
    # lower, so they are compared on an odd number of distances.
    x = features.pooled_BD.double().numpy()
    squared = cdist(x, x, "sqeuclidean")
    upper = np.sort(squared[np.triu_indices(11, 1)])
    median = upper[(len(upper) - 1) // 2]

    def k(m: int, n: int) -> float:
        return float(np.mean([math.exp(-squared[m, n] / (median * factor)) for factor in (0.25, 0.5, 1, 2, 4)]))

    def mean(ones: list[int], others: list[int]) -> float:
        return sum(k(m, n) for m in ones for n in others) / (len(ones) * len(others))

    expected = mean(SOURCE, SOURCE) + mean(TARGET, TARGET) - 2 * mean(SOURCE, TARGET)
    assert value("mmd", pair, features) == pytest.approx(expected, rel=1e-5) and expected > 0.01


@pytest.mark.parametrize("name", ["coral", "mmd"])
def test_equal_domains_are_no_distance_apart_and_one_image_is_none(name: str, pair: Pair, features: Signals) -> None:
    rows = torch.tensor([1, 2, 4, 5])
    twice = Signals(torch.zeros(8, 3), features.pooled_BD[rows].repeat(2, 1))
    halves = Labels(torch.tensor([0, 0, 1, 1, -1, -1, -1, -1]), labeled=0.5)
    assert value(name, pair, twice, halves) == pytest.approx(0.0, abs=1e-6)
    alone = Labels(torch.tensor([-1] + 10 * [0]), labeled=10 / 11)
    assert value(name, pair, features, alone) == 0.0


def test_infomax(pair: Pair) -> None:
    # Source: Liang et al. 2020, Eq. 2, in float64.
    logits = 2.0 * torch.randn(11, 3)
    p = torch.softmax(logits.double()[TARGET], dim=1).numpy()
    mean = p.mean(axis=0)
    expected = np.mean([-sum(q * math.log(q) for q in row) for row in p]) + sum(q * math.log(q) for q in mean)
    assert value("infomax", pair, Signals(logits)) == pytest.approx(expected, rel=1e-5)
    # Sure answers that are spread evenly over the classes are the least there is: -log C.
    sure = Labels(torch.full((3,), -1), labeled=0.0)
    assert value("infomax", pair, Signals(100.0 * torch.eye(3)), sure) == pytest.approx(-math.log(3), rel=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.99])
def test_mean_teacher(pair: Pair, threshold: float) -> None:
    # Source: Sohn et al. 2020, Eq. 4: a masked cross-entropy, the mean over the images without labels.
    student, teacher = 2.0 * torch.randn(11, 3), 2.0 * torch.randn(11, 3)
    q = torch.softmax(teacher.double(), dim=1).numpy()
    log_p = torch.log_softmax(student.double(), dim=1).numpy()
    counted = [n for n in TARGET if q[n].max() >= threshold]
    expected = -sum(log_p[n, q[n].argmax()] for n in counted) / len(TARGET)
    found = value("mean_teacher", pair, Signals(student), MIXED, {"logits": teacher}, threshold=threshold)
    assert found == pytest.approx(expected, rel=1e-5)
    # The parts of a batch add up, whatever images without labels each has, and were they of one image.
    kind = LOSSES.load("mean_teacher")
    term = kind(pair, kind.Config(threshold=threshold))
    for cuts in ([0, 4, 11], range(12)):
        parts = 0.0
        for rows in map(slice, cuts[:-1], cuts[1:]):
            part = replace(MIXED, classes_B=MIXED.classes_B[rows])
            parts += term(Signals(student[rows]), {"logits": teacher[rows]}, part).item() * len(part.classes_B) / 11
        assert parts == pytest.approx(expected, rel=1e-5)
