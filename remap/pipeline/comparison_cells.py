"""The runs of a comparison: each method, its swept options and loss set, with and without the teacher, every seed."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from remap.errors import RecipeError
from remap.pipeline.comparison_sweeps import (
    Settings,
    loss_set,
    options_of,
    products,
    read_sweeps,
    require_options,
    require_owners,
    shown_setting,
    with_settings,
    words_of,
)
from remap.pipeline.labels_only import labels_only, of_same_steps
from remap.recipe.named import InitSpec
from remap.recipe.schema import LossSpec, MethodSpec, Recipe
from remap.remapping.weights import INITS
from remap.tuning import CATEGORIES, METHODS, category_of, method_problems, parts_of

# Two well-known methods of each category, and a student that starts from the teacher's weights.
DEFAULT_METHODS = (
    *("full", "linear", "vpt_shallow", "vpt_deep", "houlsby", "adaptformer", "bitfit", "lora"),
    "full@weight_selection",
)
DEFAULT_SEEDS = 3
# What a cell learns from: labels alone, or the recipe's own losses with its teacher; other loss sets have their words.
ALONE, TEACHER = "alone", "teacher"
_LONGEST = 100


def chosen_methods(words: str | None) -> list[str]:
    """Return methods by name, combination (a+b), category ("prompt"), kind ("2b"), "all"; the default set for None.

    "All" and a category leave out those that need a text tower. METHOD@INIT is a method on a student that starts from
    the teacher's weights.

    Raises:
        UnknownName: Words are none of these; all are named.
        RecipeError: A method is named twice, a combination cannot be made, or a name is missing.
    """
    given = DEFAULT_METHODS if words is None else [word.strip() for word in words.split(",")]
    if not all(given):
        raise RecipeError([f"--methods: a name is missing in '{words}'"], "command line")
    found, named = list[str](), list[tuple[str, str | None]]()
    for word in given:
        # Duplicates from "all" and a name are reported below, not dropped.
        if word == "all":
            found += [row.name for row in METHODS if "words" not in row.needs]
        elif word in CATEGORIES:
            found += [row.name for row in METHODS if row.category == word and "words" not in row.needs]
        elif kind := [row.name for row in METHODS if row.kind.partition(" ")[0] == word]:
            found += kind
        else:
            found.append(word)
            named.append(split_word(word))
    # All at once; a combination with a name missing is refused below.
    METHODS.rows([part for method, _ in named for part in parts_of(method) if part], also=("all", *CATEGORIES))
    INITS.rows([init for _, init in named if init is not None])
    problems = [line for name in found for line in method_problems("--methods", split_word(name)[0])]
    if len(set(found)) < len(found):
        problems.append("--methods: a method is named twice")
    if problems:
        raise RecipeError(problems, "command line")
    return found


def split_word(word: str) -> tuple[str, str | None]:
    """Return method and initialisation of "METHOD@INIT"; the latter is None of a method alone."""
    method, at, init = word.partition("@")
    return method, init if at else None


def category_title(word: str) -> str:
    """Return the category of a method as tables show it; a student with the teacher's weights is remapped."""
    method, init = split_word(word)
    return CATEGORIES["remapping" if init is not None else category_of(method)]


@dataclass(frozen=True)
class Cell:
    """One run of the comparison.

    Attributes:
        method: As it was named: METHOD or METHOD@INIT.
        objective: ALONE, TEACHER, or the words of a loss set.
        settings: What was swept, as (key, value).
        same_as: Name of an earlier cell with the same recipe, which is run in place of this one.
    """

    method: str
    objective: str
    seed: int
    recipe: Recipe
    settings: Settings = ()
    same_as: str = ""

    @property
    def with_teacher(self) -> bool:
        return self.objective != ALONE

    @property
    def label(self) -> str:
        """Method and swept values: "vpt_deep num_prompts=5"."""
        return " ".join([self.method, *map(shown_setting, self.settings)])

    @property
    def name(self) -> str:
        """The name of its run directory."""
        words = f"{_slug(self.label)}-{_slug(self.objective)}"
        # A hash of the complete name keeps long ones apart that begin alike.
        if len(words) > _LONGEST:
            words = f"{words[: _LONGEST - 9]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        return self.same_as or f"{words}-s{self.seed}"

    @property
    def group(self) -> str:
        """The name without the seed."""
        return self.name.rpartition("-s")[0]


def comparison_cells(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int,
    sweeps: Iterable[str] = (),
    loss_sets: Iterable[str] = (),
    images_of: Callable[[Recipe], tuple[int, int]] | None = None,
    settled: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> list[Cell]:
    """Return every method without the teacher and with it, for ``seeds`` seeds from the recipe's seed upwards.

    The cells differ only in method, its learning rate, losses, seed, and what is swept. A loss on a signal that a
    method cannot change is left out for it; images without labels are used only with the teacher. What a swept
    value does not change has the same name for all values.

    Args:
        sweeps: ``KEY=V1,V2`` each: an option of the methods (``method.num_prompts``) that have it, or a recipe field.
        loss_sets: Objectives with the teacher, as words ("ce,kd:0.5"); none is the recipe's own.
        images_of: Returns how many training images of a recipe have a label, and how many an epoch has: labels alone
            then take as many steps as with the teacher. None leaves them the epochs.
        settled: Leaves out of the default losses what swept models cannot teach or learn (``without_idle_losses``).

    Raises:
        RecipeError: A sweep or loss set cannot be used.
    """
    recipe = recipe.model_copy(update={"baseline": False})  # each method has a run without the teacher
    grid = read_sweeps(sweeps)
    options = {key.removeprefix("method."): grid.pop(key) for key in list(grid) if key.startswith("method.")}
    require_owners(options, methods)
    cells: list[Cell] = []
    names: dict[tuple[str, str], str] = {}
    for of_recipe in products(grid):
        changed = settled(with_settings(recipe, of_recipe))
        sets = {words_of(losses): losses for losses in (loss_set(changed, words) for words in loss_sets)}
        data = changed.data
        partly = (data.labels, data.unlabeled, data.target) != (None, None, None)  # else nothing is looked up
        images = images_of(changed) if images_of is not None and partly else None
        objectives = {ALONE: changed.losses, **(sets or {TEACHER: changed.losses})}
        for word in methods:
            has = {name: values for name, values in options.items() if name in options_of(split_word(word)[0])}
            for of_method in products(has):
                settings = (*((f"method.{name}", value) for name, value in of_method), *of_recipe)
                for objective, losses in objectives.items():
                    one = _cell_recipe(changed, word, dict(of_method), losses, images, alone=objective == ALONE)
                    for seed in range(recipe.seed, recipe.seed + seeds):
                        cell = Cell(word, objective, seed, one.model_copy(update={"seed": seed}), settings)
                        # Labels alone, say, are the same run for each temperature of a loss on logits.
                        name = names.setdefault((word, repr(cell.recipe)), cell.name)
                        cells.append(replace(cell, same_as=name))
    # Names leave characters out and shorten weights of losses: two cells could share a run directory.
    recipes: dict[str, str] = {}
    for cell in cells:
        if recipes.setdefault(cell.name, repr(cell.recipe)) != repr(cell.recipe):
            raise RecipeError([f"--sweep: two different cells would be called {cell.name}"], "command line")
    return cells


def _cell_recipe(
    recipe: Recipe,
    word: str,
    options: dict[str, Any],
    losses: Sequence[LossSpec],
    images: tuple[int, int] | None,
    *,
    alone: bool,
) -> Recipe:
    method, init = split_word(word)
    same = method == recipe.method.name  # a recipe's options are those of its own method
    spec = MethodSpec(name=method, **{**(recipe.method.options if same else {}), **options})
    require_options(spec)
    student = recipe.student
    if init is not None:
        student = student.model_copy(update={"init": InitSpec(name=init), "force_init": True})
    # A default may differ with the method: dual_head has a classifier for the labels, and counts few of them in full.
    own = recipe.default_losses_of(recipe.method.name) if recipe.has_default_losses else ()
    of_method = {loss.name: loss for loss in recipe.default_losses_of(method)}
    losses = [of_method.get(loss.name, loss) if loss in own else loss for loss in losses]
    # An idle loss would only add a constant.
    kept = tuple(loss for loss in losses if not loss.is_idle(method))
    if alone and images is not None and images[0] < images[1]:
        recipe = of_same_steps(recipe, images[1], images[0])
    if alone and init is None:
        return labels_only(recipe).model_copy(update={"method": spec})
    if alone:  # the teacher gives its weights, and teaches nothing
        kept, recipe = labels_only(recipe).losses, recipe.model_copy(update={"data": recipe.data.labeled_part()})
    return recipe.model_copy(update={"method": spec, "student": student, "losses": kept})


def teacher_key(recipe: Recipe) -> str:
    """Return a suffix that is equal for recipes whose teachers are prepared alike: of images, and of the teachers."""
    recipe = recipe.written_out()
    data = recipe.data.labeled_part().model_dump()
    data["depth"] = data["depth"] or 1  # null means 1, and runs write it out
    decides = [data, *(spec.model_dump() for spec in recipe.teachers)]
    return "-" + hashlib.sha256(json.dumps(decides, default=str, sort_keys=True).encode()).hexdigest()[:8]


def _slug(text: str) -> str:
    """Return a name of a file: "ce,kd:0.5" is "ce+kd0.5"."""
    return re.sub(r"[^A-Za-z0-9._+=@-]", "_", text.replace(",", "+").replace(":", "").replace(" ", "-"))
