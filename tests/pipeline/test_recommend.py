"""Ranking methods by short runs on held-out training images."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import remap
from remap.errors import RecipeError, RunError
from remap.pipeline.recommend import Candidate, ranked, recommend
from remap.progress import Silent
from remap.recipe import Recipe
from remap.runs.interval import wilson
from remap.runs.run_dir import RunDir


def candidate(name: str, parameters: int, *rounds: int, of: int = 100) -> Candidate:
    """A method that answered the first so many of the images right in each round."""
    right = [np.arange(of) < count for count in rounds]
    cell: Any = SimpleNamespace(label=name)
    return Candidate(cell, parameters, [count / of for count in rounds], right)


def test_who_left_early_is_expected_to_gain_what_the_others_gained() -> None:
    found = ranked([candidate("a", 10, 50, 80), candidate("b", 5, 60, 70), candidate("c", 1, 30)], [1, 4])
    assert [row["method"] for row in found["rows"]] == ["a", "b", "c"]
    # a gained 30 points and b 10: 20 on average.
    assert found["rows"][2]["expected"] == pytest.approx(0.5)
    assert found["rows"][2]["interval"] == pytest.approx(wilson(0.5, 100))
    assert [row["measured"] for row in found["rows"]] == [True, True, False]
    # 20 of 100 images, all in one direction, are not chance; compared in the last common round.
    assert found["rows"][2]["to_best"]["mean"] == pytest.approx(-0.2) and found["rows"][2]["told_apart"]


def test_what_the_images_do_not_tell_apart_is_named_with_the_cheapest() -> None:
    found = ranked([candidate("a", 100, 90), candidate("b", 5, 89), candidate("c", 1, 60)], [4])
    assert (found["best"], found["cheapest"], found["cannot_tell"]) == ("a", "b", ["b"])


def test_half_go_on_and_no_evaluation_image_is_looked_at(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("train.epochs=8", "teacher.allow_weak=true")
    methods = ["linear", "bitfit", "lora", "norm"]
    found = recommend(recipe, methods, tmp_path / "r", Silent())
    assert [len(list((tmp_path / "r").glob(f"round-{n}/*"))) for n in (1, 2, 3)] == [4, 2, 2]
    assert [row["epochs"] for row in found["rows"]] == [[1, 2, 8], [1, 2, 8], [1], [1]]
    runs = [RunDir.open(path) for path in (tmp_path / "r").glob("round-*/*")]
    # 20 % of the 24 training images judge, rounded; the folder val/ has 9.
    assert {run.summary()["data"]["val_images"] for run in runs} == {found["held_out_images"]} == {5}
    written = {run.path: (run.path / "summary.json").stat().st_mtime_ns for run in runs}
    assert recommend(recipe, methods, tmp_path / "r", Silent()) == found
    assert {run.path: (run.path / "summary.json").stat().st_mtime_ns for run in runs} == written


def test_the_shared_teacher_belongs_to_no_method(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """It is tuned once, before the trials, and for the epochs of the recipe: those of the first round are fewer."""
    recipe, seen = tiny.recipe("train.epochs=8", "teacher.prepare=full"), watch(lambda step: None)
    recommend(recipe, ["linear", "bitfit"], tmp_path / "r", seen)
    of_teacher = [line for line in (*seen.said, *seen.waited) if "the teacher" in line]
    tuned = [line for line in of_teacher if "epoch" in line or "tuning" in line]
    assert tuned and not [line for line in tuned if line.startswith(("linear", "bitfit"))]
    assert len(RunDir.open(tmp_path / "r" / "teacher").metrics()) == 8


def test_a_budget_of_parameters_leaves_methods_out(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    recipe, seen = tiny.recipe("train.epochs=1", "teacher.allow_weak=true"), watch(lambda step: None)
    found = remap.recommend(recipe, "full,linear", budget="parameters=100", output=tmp_path / "r", progress=seen)
    assert "round 1/1: 1 method, 1 epoch each" in seen.said
    assert [row["method"] for row in found["rows"]] == ["linear"] and "full" in found["left_out"]
    # A classifier of 16 features for 3 classes.
    assert found["rows"][0]["parameters"] == 16 * 3 + 3


def test_a_budget_of_epochs_chooses_no_losses(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, one of the default losses, is left out for a student that has none, as it is without a budget."""
    seen: list[list[str]] = []

    def stop(recipe: Recipe, *_arguments: Any, **_named: Any) -> None:
        seen.append([loss.name for loss in recipe.losses])
        raise RunError("far enough")

    monkeypatch.setattr("remap.pipeline.recommend.comparison_cells", stop)
    recipe = tiny.recipe("student.weights=none", student="convnext_atto", method="full")
    with pytest.raises(RunError, match="far enough"):
        recommend(recipe, ["full", "linear"], tmp_path / "r", Silent(), "epochs=1")
    assert "attention" in [loss.name for loss in recipe.losses] and seen == [["ce", "kd"]]


def test_minutes_are_not_a_budget(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="minutes=3: not a budget of this command"):
        recommend(tiny.recipe(), ["linear"], tmp_path, Silent(), "minutes=3")


def test_one_method_has_nothing_to_be_ranked_with(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--methods linear: one method has no other"):
        recommend(tiny.recipe(), ["linear"], tmp_path / "r", Silent())
    assert not (tmp_path / "r").exists()
