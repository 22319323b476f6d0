"""The objective of a run: which losses are left out for these models, and the terms built from a recipe."""

import os
from collections.abc import Sequence
from dataclasses import replace

from remap.backbones.anatomy import Anatomy
from remap.io import checked_json
from remap.io.paths import expanded
from remap.network import Network
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import EMA, LossSpec, ModelSpec, Recipe
from remap.remapping import LOSSES
from remap.remapping.objective import LossTerm, Objective, Pair


def without_idle_losses(recipe: Recipe, progress: Progress) -> Recipe:
    """Leave attention out of the default objective where one of the models has none over the whole image, and say so.

    Losses that the user chose stay as they are, and an impossible one is an error when it is built. Every command
    calls this before it makes a run directory, so that recipe.yaml lists the losses of the run. The family is read
    from the model's name, since the recipe is settled before anything is built; a model whose name does not tell
    keeps the default.
    """
    chosen = [loss for loss in recipe.losses if LOSSES.row(loss.name).category != "attention"]
    if not recipe.has_default_losses or recipe.teacher is None or len(chosen) == len(recipe.losses):
        return recipe
    specs = [("student", recipe.student), *(("teacher", spec) for spec in recipe.teachers if not spec.is_student)]
    # A model whose family the name does not tell counts as having attention; building it decides.
    without = [f"the {role} {spec.model}" for role, spec in specs if _lacks_attention(spec)]
    if not without:
        return recipe
    have = "has" if len(without) == 1 else "have"
    progress.say(f"the attention loss is left out: {' and '.join(without)} {have} no attention over the whole image")
    return recipe.model_copy(update={"losses": tuple(chosen)})


def _lacks_attention(spec: ModelSpec) -> bool:
    from remap.backbones.families import FAMILIES
    from remap.backbones.lookup import family_of_name  # timm

    family = family_of_name(_backbone_of(spec.model))
    return family is not None and "sequence" not in FAMILIES.row(family).parts


def _backbone_of(word: str) -> str:
    """Return the model behind a run directory; other names stay as they are."""
    if not is_run(word):
        return word
    path = expanded(word)
    # A run directory has its task in a folder; a copied task is that folder itself.
    task = path / "task" / "task.json"
    values = checked_json.read_run_json(task if os.path.isfile(task) else path / "task.json")
    source = values.get("backbone") if isinstance(values, dict) else None
    return str(source.get("model", "")) if isinstance(source, dict) else ""


def pairs_of(student: Network, teachers: Sequence[Network]) -> list[Pair]:
    """Return the student with each teacher, or by itself."""
    anatomies: list[Anatomy | None] = [teacher.anatomy for teacher in teachers]
    return [Pair(student.anatomy, anatomy, len(student.classes or ())) for anatomy in anatomies or [None]]


def loss_class(loss: LossSpec, *, multilabel: bool) -> type[LossTerm]:
    """Return the class of a loss term: where an image has any number of classes, what its row names for that."""
    row = LOSSES.row(loss.name)
    if multilabel and row.multilabel != "itself":
        row = replace(row, target=row.multilabel)
    found: type[LossTerm] = row.load()
    return found


def build_objective(recipe: Recipe, pairs: Sequence[Pair]) -> Objective:
    """Build the recipe's loss terms, for the student with each of its teachers.

    With several teachers a term is their weighted mean: one copy per teacher ("kd@1", "kd@2") with projectors of its
    own, and the loss's weight divided among them. A running average that a loss brings along teaches that loss alone.
    """
    terms: dict[str, LossTerm] = {}
    weights: dict[str, float] = {}
    teacher_of: dict[str, int] = {}
    loss_of: dict[str, LossSpec] = {}
    averages, models = recipe.brings_average, [spec.model for spec in recipe.teachers]
    for loss in recipe.losses:
        cls = loss_class(loss, multilabel=recipe.data.multilabel)
        config, weight = cls.Config(**loss.options), loss.weight
        assert weight is not None  # filled in when the recipe was validated
        # Without any teacher there is still the pair of the student alone, number 0.
        taught_by = [n for n, model in enumerate(models) if not averages or (model == EMA) == loss.of_average] or [0]
        # A term that reads no teacher would be computed once for each, and is the same each time.
        if len(taught_by) == 1 or not cls.uses_teacher:
            number = teacher_of[loss.name] = taught_by[0]
            terms[loss.name], weights[loss.name], loss_of[loss.name] = cls(pairs[number], config), weight, loss
            continue
        # Weights are relative: the loss's weight stays what the recipe says.
        total = sum(recipe.teachers[number].weight for number in taught_by)
        for number in taught_by:
            name = f"{loss.name}@{number + 1}"
            terms[name] = cls(pairs[number], config)
            weights[name] = weight * recipe.teachers[number].weight / total
            teacher_of[name], loss_of[name] = number, loss
    return Objective(
        terms,
        weights,
        teacher_of,
        over_batch=[name for name, loss in loss_of.items() if loss.over_batch],
        weight_schedules={name: one for name, loss in loss_of.items() if (one := loss.weight_schedule)},
        temperature_schedules={name: one for name, loss in loss_of.items() if (one := loss.temperature_schedule)},
    )
