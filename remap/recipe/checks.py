"""Checks across fields: names that must be in a table, combinations that cannot work, options of methods and losses."""

from typing import Any

from pydantic import ValidationError

from remap.recipe.problems import lines_of
from remap.recipe.schema import Named, Recipe
from remap.registry import did_you_mean
from remap.remapping import LOSSES
from remap.tuning import METHODS


def name_problems(recipe: Recipe) -> list[str]:
    """Names that are in no table, and combinations that cannot work, one line each."""
    problems = []
    if recipe.method.name not in METHODS:
        problems.append(
            f"method.name: unknown method '{recipe.method.name}'{did_you_mean(recipe.method.name, METHODS.names)}"
            f" (allowed: {', '.join(METHODS.names)})"
        )
    for index, loss in enumerate(recipe.losses or ()):
        if loss.name not in LOSSES:
            problems.append(
                f"losses[{index}].name: unknown loss '{loss.name}'{did_you_mean(loss.name, LOSSES.names)}"
                f" (allowed: {', '.join(LOSSES.names)})"
            )
    return problems + _combination_problems(recipe)


def _combination_problems(recipe: Recipe) -> list[str]:
    problems = []
    names = [loss.name for loss in recipe.losses or ()]
    if not names:
        problems.append("losses: at least one loss is needed")
    elif all(not loss.weight for loss in recipe.losses if loss.name in LOSSES):
        problems.append("losses: every weight is 0, nothing would be learned")
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"losses: '{name}' is given twice")
    needing = [name for name in dict.fromkeys(names) if name in LOSSES and LOSSES.row(name).category != "labels"]
    teaching = ("labels", "logits")
    if names and not any(LOSSES.row(loss.name).category in teaching for loss in recipe.losses if loss.name in LOSSES):
        problems.append("losses: none of them trains the classifier (add ce, kd or dist)")
    if recipe.teacher is None and needing:
        problems.append(f"losses: {', '.join(needing)} need a teacher (set teacher.model, or keep to ce)")
    if recipe.teacher is not None:
        allowed = ("probe", "none", *METHODS.names)
        if recipe.teacher.prepare not in allowed:
            problems.append(
                f"teacher.prepare: unknown word '{recipe.teacher.prepare}'"
                f"{did_you_mean(recipe.teacher.prepare, allowed)} (allowed: {', '.join(allowed)})"
            )
    if recipe.train.warmup_epochs is not None and recipe.train.warmup_epochs >= recipe.train.epochs:
        problems.append(
            f"train.warmup_epochs: {recipe.train.warmup_epochs} must be less than train.epochs {recipe.train.epochs}"
        )
    if recipe.train.batch_size % recipe.train.accumulation:
        problems.append(
            f"train.batch_size: {recipe.train.batch_size} is not a multiple of accumulation {recipe.train.accumulation}"
        )
    return problems


def option_problems(recipe: Recipe) -> list[str]:
    """Options the class behind a name does not take. Imports the classes, and so torch."""
    problems = []
    if recipe.method.name in METHODS:
        problems += _options_of("method", METHODS.load(recipe.method.name), recipe.method)
    for index, loss in enumerate(recipe.losses or ()):
        if loss.name in LOSSES:
            problems += _options_of(f"losses[{index}]", LOSSES.load(loss.name), loss)
    return problems


def _options_of(place: str, owner: Any, spec: Named) -> list[str]:
    try:
        owner.Config(**spec.options)
    except ValidationError as error:
        return lines_of(error, owner.Config, place, also=type(spec).model_fields)
    return []
