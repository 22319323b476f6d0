"""Few labels: what holds images out must not take all images of a class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.errors import DataError
from remap.pipeline.compare import compare
from remap.pipeline.comparison_plan import Plan
from remap.pipeline.recommend import recommend
from remap.pipeline.run import validate_inputs
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import Recipe

# One label a class: of three, each of these would hold one out.
HOLDING = {
    "selection": ("train.keep=best", "data.selection=0.3"),
    "held_out": ("data.held_out=0.3",),
    "calibrate": ("teacher.calibrate=true",),
}


def validate(recipe: Recipe) -> None:
    validate_inputs(recipe, SharedResources())


@pytest.mark.parametrize("settings", HOLDING.values(), ids=HOLDING)
def test_a_class_of_which_all_labels_would_be_held_out_is_named(tiny: Any, settings: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="all labelled images of a class would be held out.*\n.*(blue|green|red); 2 "):
        validate(tiny.recipe("data.labels=3", *settings, losses="ce,kd"))
    validate(tiny.recipe("data.labels=6", *settings, losses="ce,kd"))


def test_a_temperature_beside_selection_images_takes_no_class_either(tiny: Any) -> None:
    """Half of two labels a class choose the epoch, and of one a class a fifth would be held out."""
    settings = ("data.labels=6", "train.keep=best", "data.selection=0.5")
    validate(tiny.recipe(*settings, losses="ce,kd"))
    with pytest.raises(DataError, match="all labelled images of a class would be held out"):
        validate(tiny.recipe(*settings, "teacher.calibrate=true", losses="ce,kd"))


def test_losses_cannot_be_chosen_by_classes_that_are_not_learned(tiny: Any) -> None:
    with pytest.raises(DataError, match="all labelled images of a class"):
        validate(tiny.recipe("data.labels=3", losses="auto"))


def _search(recipe: Recipe, folder: Path) -> None:
    compare(recipe, ["linear"], 1, folder, Silent(), Plan(search="random:1"))


def _recommend(recipe: Recipe, folder: Path) -> None:
    recommend(recipe, ["linear", "bitfit"], folder, Silent())


@pytest.mark.parametrize("command", [_search, _recommend])
def test_methods_are_not_ranked_by_them_either(tiny: Any, tmp_path: Path, command: Callable[..., None]) -> None:
    with pytest.raises(DataError, match="all labelled images of a class"):
        command(tiny.recipe("data.labels=3", losses="ce,kd"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
