"""Classes of different sizes: weights and draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from remap.data.augmentation import PRESETS
from remap.data.balance import answer_weights, class_weights, draw
from remap.data.order import EpochPlan
from remap.remapping.knowledge.logits.distillation import CrossEntropy
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals

LABELS = np.repeat([0, 1, 2], [80, 15, 5])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_are_powers_of_the_counts_with_a_mean_of_one(power: float) -> None:
    """By hand: n^-power, and at 1 each class counts a third of all."""
    weights = class_weights(LABELS, 3, power)
    assert weights[LABELS].mean() == pytest.approx(1.0)
    assert weights[2] / weights[0] == pytest.approx(16**power)
    if power == 1.0:
        assert [weights[label] * (label == LABELS).sum() for label in range(3)] == pytest.approx([100 / 3] * 3)
    assert class_weights(np.append(LABELS, -1), 4, power).tolist() == pytest.approx([*weights, 0.0])


def test_a_yes_counts_a_power_of_images_without_to_images_with_the_class() -> None:
    """By hand: 1 of 4 images, 3 of 4, none and all of them; the last has no labels."""
    sets = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [-1, -1, -1, -1]], np.int8)
    assert answer_weights(sets, 1.0).tolist() == pytest.approx([3.0, 1 / 3, 1.0, 1.0])
    assert answer_weights(sets, 0.5).tolist() == pytest.approx([3**0.5, 3**-0.5, 1.0, 1.0])


def test_an_image_is_drawn_as_often_as_expected_to_within_one() -> None:
    expected = class_weights(LABELS, 3, 0.7)[LABELS]
    for epoch in range(20):
        counts = np.bincount(draw(3, epoch, expected), minlength=100)
        assert counts.sum() == 100
        assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    mean = np.mean([np.bincount(draw(3, epoch, expected), minlength=100) for epoch in range(400)], axis=0)
    assert abs(mean - expected).max() < 0.15, "0.5 / sqrt(400) is the largest standard error"
    assert sorted(draw(3, 0, np.ones(100))) == list(range(100))
    assert not np.array_equal(draw(3, 0, expected), draw(3, 1, expected))


def test_processes_draw_the_same_epoch() -> None:
    """Two processes and a resume see the parts of what one sees."""
    expected = class_weights(LABELS, 3, 1.0)[LABELS]
    one = EpochPlan(1, 100, 20, 1, 0, 1, PRESETS["none"], expected=expected)
    ranks = [replace(one, rank=rank, processes=2) for rank in range(2)]
    whole = [indices.tolist() for indices, _ in one.pairs(4)]
    parts = zip(*([indices.tolist() for indices, _ in plan.pairs(4)] for plan in ranks), strict=True)
    assert [first + second for first, second in parts] == whole
    assert [indices.tolist() for indices, _ in one.pairs(4, 3)] == whole[3:]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_weighted_loss_by_hand(smoothing: float, mixed: bool) -> None:
    """In float64: mean over images of -sum_c w_c q_c log p_c, q the smoothed, maybe mixed label."""
    torch.manual_seed(0)
    logits, own, other = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0]), torch.tensor([1, 1, 0, 2, 2])
    share, weights = torch.tensor([0.25, 1.0, 0.5, 0.75, 0.9]), torch.tensor([0.5, 1.5, 4.0])
    labels = Labels(own, other, share, weights_C=weights) if mixed else Labels(own, weights_C=weights)
    term = CrossEntropy(Pair(None, None, 3), CrossEntropy.Config(label_smoothing=smoothing))
    own_BC, other_BC = F.one_hot(own, 3).double(), F.one_hot(other, 3).double()
    wanted = share[:, None].double() * own_BC + (1 - share[:, None].double()) * other_BC if mixed else own_BC
    wanted = (1 - smoothing) * wanted + smoothing / 3
    expected = -(weights.double() * wanted * logits.double().log_softmax(1)).sum(1).mean()
    assert term(Signals(logits, None), {}, labels).item() == pytest.approx(expected.item(), rel=1e-6)
