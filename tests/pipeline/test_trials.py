"""losses: auto tries objectives on held-out training images, and leaves its choice in the recipe."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.data.sources import open_data
from remap.errors import Interrupted, RecipeError, RunError
from remap.pipeline.compare import compare as compare_methods
from remap.pipeline.run import resume, start
from remap.pipeline.run_differences import compare
from remap.pipeline.shared import SharedResources
from remap.pipeline.trials import chosen, objectives, trials
from remap.progress import Silent
from remap.recipe import Recipe
from remap.runs.run_dir import RunDir


def auto(tiny: Any, *settings: str) -> Recipe:
    return tiny.recipe("teacher.allow_weak=true", *settings, losses="auto")


def test_held_out_images_are_training_images(tiny: Any) -> None:
    """Of 8 images of each of 3 classes, 80 % are learned from and the others judge; the evaluation images do not."""
    whole, part = (open_data(tiny.data, None, 0.2, held_out=share) for share in (None, 0.25))
    assert set(part.train.names) | set(part.val.names) == set(whole.train.names)
    assert sorted(part.val.labels) == [0, 0, 1, 1, 2, 2] and len(part.train) == 18
    assert part.test is None


def test_trials_are_short_and_by_labels_alone_as_long(tiny: Any) -> None:
    recipe = auto(tiny, "data.labels=12", "train.epochs=8", "train.warmup_epochs=2", "train.batch_size=2")
    found = dict(trials(recipe, SharedResources()))
    assert list(found) == ["labels", "labels-kd1", "labels-kd2", "labels-kd4", "kd1", "labels-kd4-attention"]
    # 10 labels and 12 images without: 11 steps an epoch with a teacher, 5 by labels alone; a quarter of 8 epochs.
    assert (found["kd1"].train.epochs, found["labels"].train.epochs) == (2, 5)
    assert found["labels"].train.warmup_epochs == pytest.approx(0.5 * 11 / 5)
    assert not found["labels"].teachers and all(one.data.held_out == 0.2 for one in found.values())


def test_the_best_is_taken_and_of_equal_ones_the_first(tiny: Any) -> None:
    recipe, shared = auto(tiny), SharedResources()
    names = list(objectives(recipe))
    best = chosen(recipe, {name: 0.9 if name in ("labels-kd2", "kd1") else 0.5 for name in names}, shared)
    assert [(loss.name, loss.options) for loss in best.losses] == [("ce", {}), ("kd", {"temperature": 2.0})]
    assert not best.choose_losses and best.train == recipe.train
    assert not chosen(recipe, dict.fromkeys(names, 0.5), shared).teachers


def test_the_choice_is_in_the_recipe_and_resumes(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """A trial takes three steps here: the signal comes in the second."""
    recipe = auto(tiny, "train.batch_size=6")
    first = start(recipe, tmp_path / "first")
    kept = RunDir(first.run_dir).recipe()
    assert not kept.choose_losses and {loss.name: loss.weight for loss in kept.losses} == first.summary["losses"]

    def interrupt(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "run", watch(interrupt))
    assert RunDir(tmp_path / "run").recipe().choose_losses
    resume(tmp_path / "run")
    assert compare(RunDir(first.run_dir), RunDir(tmp_path / "run"))["equal"]


def test_where_there_is_nothing_to_choose(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="losses: auto chooses among losses with a teacher"):
        tiny.recipe("teacher=null", losses="auto")
    with pytest.raises(RunError, match="a comparison is of one objective"):
        compare_methods(auto(tiny), ["linear"], 1, tmp_path / "comparison", Silent())
