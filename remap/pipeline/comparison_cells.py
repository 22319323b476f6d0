"""The runs of a comparison: each method with and without the teacher, for every seed."""

from collections.abc import Sequence
from dataclasses import dataclass

from remap.errors import RecipeError
from remap.recipe.checks import method_problems
from remap.recipe.schema import LossSpec, MethodSpec, Recipe
from remap.remapping import LOSSES
from remap.tuning import CATEGORIES, METHODS, parts_of, rows_of

# One or two well-known methods of each category.
DEFAULT_METHODS = ("full", "linear", "vpt_shallow", "vpt_deep", "adaptformer", "bitfit", "lora")


def chosen_methods(words: str | None) -> list[str]:
    """Return methods by name or combination, by category ("prompt"), "all", or the default set for None.

    Raises:
        UnknownName: A word is none of these.
        RecipeError: A method is named twice, or a combination cannot be made.
    """
    found: list[str] = []
    for word in [word.strip() for word in words.split(",") if word.strip()] if words else DEFAULT_METHODS:
        # Duplicates from "all" and a name are reported below, not dropped.
        if word == "all":
            found += METHODS.names
        elif word in CATEGORIES:
            found += [row.name for row in METHODS if row.category == word]
        else:
            if all(parts_of(word)):
                rows_of(word)
            found.append(word)
    problems = [line for name in found for line in method_problems("--methods", name)]
    if len(set(found)) < len(found):
        problems.append("--methods: a method is named twice")
    if problems:
        raise RecipeError(problems, "command line")
    return found


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    method: str
    with_teacher: bool
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.method}-{'teacher' if self.with_teacher else 'alone'}-s{self.seed}"


def comparison_cells(recipe: Recipe, methods: Sequence[str], seeds: int) -> list[Cell]:
    """Return every method with and without the teacher, for ``seeds`` seeds from the recipe's seed upwards.

    The cells differ only in method, its learning rate, losses and seed. A loss on a signal that a method cannot change
    is left out for it; images without labels are used only with the teacher.
    """
    cells, recipe = [], recipe.model_copy(update={"baseline": False})  # each method has a run without the teacher
    for method in methods:
        spec = recipe.method if method == recipe.method.name else MethodSpec(name=method)
        for with_teacher in (False, True):
            for seed in range(recipe.seed, recipe.seed + seeds):
                # An idle loss would only add a constant.
                losses = tuple(loss for loss in recipe.losses if not loss.is_idle(method))
                cell = (recipe if with_teacher else labels_only(recipe)).model_copy(
                    update={"method": spec, "seed": seed, **({"losses": losses} if with_teacher else {})}
                )
                cells.append(Cell(method, with_teacher, seed, cell))
    return cells


def labels_only(recipe: Recipe) -> Recipe:
    """Return the same recipe without teachers: losses on labels alone (ce where there are none), labelled images."""
    default = LossSpec(name="ce", weight=LOSSES.row("ce").weight)
    return recipe.model_copy(
        update={
            "baseline": False,
            "choose_losses": False,
            "data": recipe.data.labeled_part(),
            "teachers": (),
            # Without a teacher the student does not start from its weights either.
            "student": recipe.student.model_copy(update={"init": None, "force_init": False}),
            "losses": tuple(one for one in recipe.losses if LOSSES.row(one.name).category == "labels") or (default,),
        }
    )
