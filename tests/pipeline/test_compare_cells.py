"""Which runs a comparison has: methods, sweeps, loss sets, budgets; nothing is trained."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from remap.data.sources import open_data
from remap.errors import RecipeError
from remap.pipeline.comparison_budget import of_length, read_budget, within_parameters
from remap.pipeline.comparison_cells import category_title, chosen_methods, comparison_cells
from remap.pipeline.comparison_plan import Plan, require_possible
from remap.pipeline.comparison_search import Search, require_searchable
from remap.pipeline.objective import without_idle_losses
from remap.progress import Silent
from remap.recipe import resolve, resolve_distill
from remap.tuning import CATEGORIES


def test_the_default_is_two_methods_of_each_category_and_a_remapped_student() -> None:
    titles = [category_title(word) for word in chosen_methods(None)]
    assert [titles.count(title) for title in CATEGORIES.values()] == [2, 2, 2, 2, 1]


def test_options_are_swept_where_a_method_has_them(tiny: Any) -> None:
    sweeps = ["method.num_prompts=5,10", "method.place=prepend,add"]
    cells = comparison_cells(tiny.recipe(losses="ce,kd"), ["vpt_deep", "lora"], 2, sweeps)
    labels = list(dict.fromkeys(cell.label for cell in cells))
    assert labels == [
        *(f"vpt_deep num_prompts={count} place={place}" for count in (5, 10) for place in ("prepend", "add")),
        "lora",
    ]
    assert len(cells) == len({cell.name for cell in cells}) == 5 * 2 * 2
    assert {cell.recipe.method.options.get("num_prompts") for cell in cells} == {5, 10, None}
    assert cells[0].name == "vpt_deep-num_prompts=5-place=prepend-alone-s0"


def test_a_joint_teacher_is_compared_with_several_loss_sets() -> None:
    """Only slad goes with it."""
    cells = comparison_cells(resolve("slad"), ["slad"], 1, loss_sets=["ce,kd", "ce,kd:0.5"])
    weights = [[loss.weight for loss in cell.recipe.losses] for cell in cells if cell.with_teacher]
    assert weights == [[1.0, 1.0], [1.0, 0.5]]


def test_what_a_swept_value_does_not_change_is_run_once(tiny: Any) -> None:
    """Labels alone are the same for each temperature, and for each loss set."""
    recipe = tiny.recipe(losses="ce,kd")
    cells = comparison_cells(recipe, ["lora"], 1, ["losses.kd.temperature=1,2.5"], ["ce,kd", "ce,kd:0.5"])
    assert len(cells) == 2 * 3 and len({cell.name for cell in cells}) == 1 + 2 * 2
    taught = {(cell.objective, cell.settings[0][1]): cell.recipe.losses[1] for cell in cells if cell.with_teacher}
    found = {key: (loss.weight, loss.options["temperature"]) for key, loss in taught.items()}
    weights = {"ce,kd": 1.0, "ce,kd:0.5": 0.5}
    assert found == {(words, t): (weight, t) for words, weight in weights.items() for t in (1, 2.5)}


def test_labels_alone_are_learned_where_a_loss_on_them_counts_nothing(tiny: Any) -> None:
    """A weight of 0 left the column "labels only" a student that had learned nothing."""
    cells = comparison_cells(tiny.recipe(losses="ce,kd"), ["lora"], 1, ["losses.ce.weight=0,1"], ["kd", "ce:0,kd"])
    assert {loss.weight for cell in cells if not cell.with_teacher for loss in cell.recipe.losses} == {1.0}
    assert len({cell.name for cell in cells if not cell.with_teacher}) == 1


def test_a_remapped_student_without_the_teachers_losses_keeps_its_weights(tiny: Any) -> None:
    alone, taught = comparison_cells(tiny.recipe(losses="ce,kd"), ["full@layers"], 1)
    assert alone.recipe.student.init == taught.recipe.student.init and alone.recipe.student.init.name == "layers"
    assert [loss.name for loss in alone.recipe.losses] == ["ce"] and alone.recipe.teacher == taught.recipe.teacher


def test_labels_alone_take_as_many_steps_as_with_the_teacher(tiny: Any) -> None:
    """24 images in batches of 8 for 2 epochs are 6 steps; 8 of them with a label make a step an epoch."""
    recipe = tiny.recipe("train.batch_size=8", "train.epochs=2", "data.labels=8", losses="ce,kd")
    alone, taught = comparison_cells(recipe, ["lora"], 1, images_of=lambda recipe: (8, 24))
    assert (alone.recipe.train.epochs, taught.recipe.train.epochs) == (6, 2)
    assert (alone.recipe.train.eval_every, taught.recipe.train.eval_every) == (3, 1), "evaluated as often"


def test_losses_warm_up_for_the_same_part_of_a_run(tiny: Any) -> None:
    """1 of 2 epochs of 3 steps are 3 of 6 epochs of 1 step by labels alone, and half of the 4 epochs of a budget."""
    schedule = "losses.ce.weight_schedule={warmup_epochs: 1}"
    recipe = tiny.recipe("train.batch_size=8", "train.epochs=2", "data.labels=8", schedule, losses="ce,kd")
    alone, taught = comparison_cells(recipe, ["lora"], 1, images_of=lambda recipe: (8, 24))
    found = [cell.losses[0].weight_schedule for cell in (alone.recipe, taught.recipe, of_length(taught.recipe, 4))]
    assert [one and one.warmup_epochs for one in found] == [3, 1, 2]


def test_default_losses_are_those_that_swept_models_can_learn() -> None:
    settled = partial(without_idle_losses, progress=Silent())
    sweeps = ["student.model=mini_student,resnet18", "losses.kd.temperature=2"]

    def losses(words: str | None) -> list[list[str]]:
        recipe = resolve_distill(None, {"student": "mini_student", "losses": words}, ["student.weights=none"])
        cells = comparison_cells(recipe, ["full"], 1, sweeps, settled=settled)
        return [[loss.name for loss in cell.recipe.losses] for cell in cells if cell.with_teacher]

    assert losses(None) == [["ce", "kd", "attention"], ["ce", "kd"]]
    assert losses("ce,kd,attention") == [["ce", "kd", "attention"]] * 2, "what is named stays"


@pytest.mark.parametrize("base", ["lora", "dual_head"])
def test_few_labels_have_the_default_weight_of_each_cells_method(base: str) -> None:
    def weights(words: str | None, *settings: str) -> list[float]:
        recipe = resolve_distill(None, {"method": base, "losses": words}, ["data.labels=200", *settings])
        cells = comparison_cells(recipe, ["lora", "dual_head", "lora+dual_head"], 1)
        return [cell.recipe.losses[0].weight for cell in cells if cell.with_teacher]

    assert weights(None) == [0.1, 1.0, 1.0]
    assert weights("ce:0.3,kd") == [0.3, 0.3, 0.3], "what is named stays"


def test_a_budget_of_minutes_decides_the_epochs(tiny: Any, tmp_path: Path) -> None:
    plan = Plan(["train.epochs=1,2"], budget="minutes=1")
    with pytest.raises(RecipeError, match=r"--sweep train\.epochs: the epochs follow from the budget minutes=1"):
        require_possible(tiny.recipe(losses="ce,kd"), ["lora"], 1, tmp_path / "c", plan)


@pytest.mark.parametrize(
    ("sweeps", "loss_sets", "says"),
    [
        (["method.num_prompts"], [], "write KEY=VALUE,VALUE"),
        (["method.num_prompts=5,5"], [], "a value is given twice"),
        (["method.rank=4"], [], "none of vpt_deep has it"),
        (["method.num_prompts=0"], [], "num_prompts"),
        (["seed=1,2"], [], "--seeds"),
        (["train.epoch=1"], [], "unknown key"),
        ([], ["ce,nothing"], "unknown loss"),
        ([], ["ce:x"], "must be a number"),
    ],
)
def test_sweeps_that_cannot_be_used(tiny: Any, sweeps: list[str], loss_sets: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        comparison_cells(tiny.recipe(losses="ce,kd"), ["vpt_deep"], 1, sweeps, loss_sets)


@pytest.mark.parametrize("words", ["epoch=1", "epochs=0", "minutes=nan", "parameters=1.5", "5"])
def test_budgets_that_are_none(words: str) -> None:
    with pytest.raises(RecipeError, match="not a budget"):
        read_budget(words)


@pytest.mark.parametrize("words", ["x", "0", "grid:3", ":3", "tpe:"])
def test_searches_that_are_none(words: str) -> None:
    with pytest.raises(RecipeError, match="--search"):
        Search.read(words)
    assert Search.read("20") == Search(20, "tpe") and Search.read("random:3") == Search(3, "random")


def test_a_search_needs_images_that_nothing_else_holds_out(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.held_out"):
        require_searchable(tiny.recipe("data.held_out=0.5", losses="ce,kd"))


def test_a_budget_of_parameters_is_filled_by_the_closed_form(tiny: Any) -> None:
    """Student: depth L 2, width D 16; head 3 (D + 1) = 51. vpt_deep trains L p D (Jia et al. 2022), lora 4 L D r (Hu et
    al. 2022, query and value), houlsby 2 L (2 D r + r + D) (Houlsby et al. 2019); full tuning is above the budget.
    """
    most, head, depth, width = 700, 51, 2, 16
    cells = comparison_cells(tiny.recipe(losses="ce,kd"), ["vpt_deep", "lora", "houlsby", "full", "linear"], 1)
    kept, left_out = within_parameters(cells, most, classes=3)
    found = {cell.method: cell.recipe.method.options for cell in kept}
    assert found["vpt_deep"]["num_prompts"] == (most - head) // (depth * width)
    assert found["lora"]["rank"] == (most - head) // (4 * depth * width)
    assert found["houlsby"]["bottleneck"] == ((most - head) // (2 * depth) - width) // (2 * width + 1)
    assert found["linear"] == {} and list(left_out) == ["full"] and "trains" in left_out["full"]
    with pytest.raises(RecipeError, match="lora trains more parameters with any rank"):
        within_parameters([cell for cell in cells if cell.method == "lora"], 60, classes=3)


def test_some_images_of_each_class_are_the_same_ones_every_time(tiny: Any) -> None:
    """8 images of each of 3 classes; evaluation images stay."""
    whole, few, more = (open_data(tiny.data, None, 0.2, per_class=count) for count in (None, 3, 20))
    assert few.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert set(few.train.names) < set(whole.train.names) and few.val.names == whole.val.names
    assert few.train.names == open_data(tiny.data, None, 0.2, per_class=3).train.names
    assert more.train.names == whole.train.names


def test_cells_of_one_name_are_refused_where_they_differ(tiny: Any) -> None:
    cells = comparison_cells(tiny.recipe(), ["lora"], 1, ["train.lr=0.1234567,0.12345671"])
    assert len({cell.name for cell in cells}) == 4
