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
    assert list(found) == ["labels", "labels-kd1", "labels-kd2", "labels-kd4", "kd1", "labels-kd2-attention"]
    # 10 labels and 12 images without: 11 steps an epoch with a teacher, 5 by labels alone; a quarter of 8 epochs.
    assert (found["kd1"].train.epochs, found["labels"].train.epochs) == (2, 5)
    assert found["labels"].train.warmup_epochs == pytest.approx(0.5 * 11 / 5)
    assert not found["labels"].teachers and all(one.data.held_out == 0.2 for one in found.values())
    # A trial chooses no epoch, so the images that the run holds out for that are learned from.
    chooses = auto(
        tiny, "data.labels=12", "train.epochs=8", "train.batch_size=2", "data.selection=0.4", "train.keep=best"
    )
    found = dict(trials(chooses, SharedResources()))
    assert (found["kd1"].train.epochs, found["labels"].train.epochs) == (2, 5)
    # The 12 without labels alone: 6 steps an epoch.
    alone = auto(tiny, "data.labels=12", "data.unlabeled_only=true", "train.batch_size=2")
    found = dict(trials(alone, SharedResources()))
    assert (found["kd1"].train.epochs, found["labels"].train.epochs) == (1, 2)


def test_a_trial_does_not_ask_of_few_images_what_a_run_asks_of_all(tiny: Any) -> None:
    found = dict(trials(tiny.recipe(losses="auto"), SharedResources()))
    assert all(spec.allow_weak for spec in found["kd1"].teachers)


def test_a_student_that_is_cut_is_not_tried_without_its_teacher(tiny: Any) -> None:
    assert list(objectives(auto(tiny, "student=shrink(teacher, depth=2)")))[0] == "labels-kd1"


def test_the_default_is_tried_with_its_own_temperature(tiny: Any) -> None:
    """Which may be none of those that are tried besides; the file of a recipe may say so of a choice."""
    assert list(objectives(auto(tiny)))[-1] == "labels-kd4-attention"
    recipe = tiny.recipe("choose_losses=true", "losses.kd.temperature=3", "losses.kd.weight=2", losses=None)
    name, losses = list(objectives(recipe).items())[-1]
    assert name == "labels-kd3-attention" and losses == recipe.losses


def test_the_best_is_taken_and_of_equal_ones_the_first(tiny: Any) -> None:
    recipe, shared = auto(tiny), SharedResources()
    names = list(objectives(recipe))
    best = chosen(recipe, {name: 0.9 if name in ("labels-kd2", "kd1") else 0.5 for name in names}, shared)
    assert [(loss.name, loss.options) for loss in best.losses] == [("ce", {}), ("kd", {"temperature": 2.0})]
    assert not best.choose_losses and best.train == recipe.train
    assert not chosen(recipe, dict.fromkeys(names, 0.5), shared).teachers


def test_the_choice_is_in_the_recipe_and_resumes(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """A trial takes three steps here: the signal comes in the second. The run then chooses among its epochs."""
    recipe = auto(tiny, "train.batch_size=6", "train.keep=best")
    locked = []

    def lock(step: int) -> None:
        if not RunDir(tmp_path / "first").recipe().choose_losses:
            with pytest.raises(RunError, match="another process is working"), RunDir(tmp_path / "first").held():
                pass
            locked.append(step)

    progress = watch(lock)
    first = start(recipe, tmp_path / "first", progress)
    assert not any("computed again" in text for text in progress.said), "which is of a run that is resumed"
    assert locked, "the recipe with the choice is another file, and locked as the one before was"
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


def test_what_holds_out_images_itself_takes_no_held_out_images(tiny: Any, tmp_path: Path) -> None:
    for settings, losses in (((), "auto"), (("teacher.calibrate=true",), "ce,kd")):
        with pytest.raises(RecipeError, match=r"data.held_out: \S.* cannot hold out"):
            start(tiny.recipe("data.held_out=0.3", *settings, losses=losses), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_there_is_nothing_to_choose(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="losses: auto chooses among losses with a teacher"):
        tiny.recipe("teacher=null", losses="auto")
    with pytest.raises(RunError, match="a comparison is of one objective"):
        compare_methods(auto(tiny), ["linear"], 1, tmp_path / "comparison", Silent())
    joint = tiny.recipe("teacher.joint=true", method="slad", losses="ce,kd")
    with pytest.raises(RunError, match="shares adapters with slad alone"):
        compare_methods(joint, ["slad", "lora"], 1, tmp_path / "comparison", Silent())
