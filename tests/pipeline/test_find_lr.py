"""The learning-rate range test."""

from typing import Any

import pytest

import remap
from remap.engine.lr_range import smoothed, suggestion
from remap.errors import RecipeError, RunError, TrainingError


def test_the_running_mean_by_hand() -> None:
    """With weights 0.9^2, 0.9 and 1 of the three values."""
    assert smoothed([1.0, 2.0, 4.0]) == pytest.approx([1.0, 2.9 / 1.9, (0.81 + 1.8 + 4.0) / 2.71])


def test_a_tenth_of_the_rate_with_the_lowest_loss_is_suggested() -> None:
    """A loss that falls to a known rate and rises from there on: steep enough that its running mean turns there."""
    rates = [10.0**power for power in range(-5, 3)]
    found = suggestion(rates, [5.0, 5.0, 4.0, 3.0, 1.0, 50.0, 400.0, 900.0], 8)
    assert (found.lowest, found.diverged) == (rates[4], True) and found.suggested == pytest.approx(rates[3])
    assert not suggestion(rates, [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8).diverged
    with pytest.raises(TrainingError, match="does not fall at any"):
        suggestion(rates, [1.0, 2.0, 3.0], 8)


def test_a_rate_is_found_for_a_recipe(tiny: Any) -> None:
    """Rates grow by one factor; the suggestion lies where the loss still fell, and the same test gives it again."""
    recipe = tiny.recipe("train.optimizer=sgd", "train.lr=null", method="linear", losses="ce,kd")
    found, again = (remap.find_lr(recipe, steps=40) for _ in range(2))
    assert found == again
    factors = [late / early for early, late in zip(found.rates, found.rates[1:], strict=False)]
    assert factors == pytest.approx([1e7 ** (1 / 39)] * len(factors)) and found.rates[0] == pytest.approx(1e-6)
    assert found.suggested == pytest.approx(found.lowest / 10) and 1e-6 < found.lowest <= 10.0
    assert min(found.losses) < found.losses[0]


def test_a_teacher_of_the_best_way_has_a_head_for_the_test(tiny: Any, watch: Any) -> None:
    """The same figures as with prepare=probe: the ways are tried by runs, and last longer than the test."""
    progress = watch(lambda step: None)
    found, probed = (
        remap.find_lr(tiny.recipe(f"teacher.prepare={way}", losses="ce,kd"), steps=12, progress=progress)
        for way in ("auto", "probe")
    )
    assert found == probed
    assert sum("a head is fitted for the range test alone" in line for line in progress.said) == 1


def test_mistakes_are_said(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"remap lr: 1 problem\n.*steps: 3 are too few"):
        remap.find_lr(tiny.recipe(), steps=3)
    with pytest.raises(RecipeError, match="name the losses"):
        remap.find_lr(tiny.recipe(losses="auto"))
    with pytest.raises(RecipeError, match="train.processes: a range test runs in one process, not in 2"):
        remap.find_lr(tiny.recipe("train.processes=2"))
    with pytest.raises(RecipeError, match="train.fit: ridge takes no steps"):
        remap.find_lr(tiny.recipe("train.fit=ridge", "train.lr=null", method="linear", losses="ce", teacher=None))
    with pytest.raises(RunError, match="the teacher has to be tuned"):
        remap.find_lr(tiny.recipe("teacher.prepare=full"))
