"""Checks across fields: names that must be in a table, combinations that cannot work, options of methods and losses."""

from pydantic import BaseModel, ValidationError

from remap.recipe.problems import lines_of
from remap.recipe.schema import Named, Recipe, is_idle
from remap.registry import did_you_mean
from remap.remapping import LOSSES
from remap.tuning import METHODS, combination_problems, config_of, parts_of


def name_problems(recipe: Recipe) -> list[str]:
    """Names that are in no table, and combinations that cannot work, one line each."""
    problems = []
    problems += method_problems("method.name", recipe.method.name)
    for index, loss in enumerate(recipe.losses or ()):
        if loss.name not in LOSSES:
            problems.append(
                f"losses[{index}].name: unknown loss '{loss.name}'{did_you_mean(loss.name, LOSSES.names)}"
                f" (allowed: {', '.join(LOSSES.names)})"
            )
    return problems + _combination_problems(recipe)


def method_problems(place: str, method: str) -> list[str]:
    """What is wrong with a method's name or combination."""
    parts = parts_of(method)
    if len(parts) > 1 and not all(parts):
        where = "after" if parts[0] else "before"
        return [f"{place}: a name is missing {where} '+' in '{method}'"]
    listed = [word.strip() for word in method.split(",")]
    if len(listed) > 1 and all(word in METHODS for word in listed):
        return [f"{place}: '{method}' is a list; did you mean '{'+'.join(listed)}', one combination of them?"]
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        return [
            f"{place}: unknown method '{part}'{did_you_mean(part, METHODS.names)} (allowed: {', '.join(METHODS.names)})"
            for part in unknown
        ]
    return [f"{place}: {problem}" for problem in combination_problems(method)]


def _combination_problems(recipe: Recipe) -> list[str]:
    problems = []
    names = [loss.name for loss in recipe.losses or ()]
    if not names:
        problems.append("losses: at least one loss is needed")
    elif all(not loss.weight for loss in recipe.losses if loss.name in LOSSES):
        problems.append("losses: every weight is 0, nothing would be learned")
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"losses: '{name}' is given twice")
    problems += [
        f"losses: {name} cannot teach {recipe.method.name}, which leaves what it compares as it is (leave it out)"
        for name in dict.fromkeys(names)
        if is_idle(name, recipe.method.name)
    ]
    needing = [name for name in dict.fromkeys(names) if name in LOSSES and LOSSES.row(name).category != "labels"]
    teaching = ("labels", "logits")
    if names and not any(LOSSES.row(loss.name).category in teaching for loss in recipe.losses if loss.name in LOSSES):
        problems.append("losses: none of them trains the classifier (add ce, kd or dist)")
    if recipe.teacher is None and needing:
        problems.append(f"losses: {', '.join(needing)} need a teacher (set teacher.model, or keep to ce)")
    if recipe.teacher is not None:
        allowed, prepare = ("probe", "none", *METHODS.names), recipe.teacher.prepare
        if "+" in prepare or "," in prepare:
            problems += method_problems("teacher.prepare", prepare)
        elif prepare not in allowed:
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
    if not method_problems("method.name", recipe.method.name):
        problems += _options_of("method", config_of(recipe.method.name), recipe.method)
    for index, loss in enumerate(recipe.losses or ()):
        if loss.name in LOSSES:
            problems += _options_of(f"losses[{index}]", LOSSES.load(loss.name).Config, loss)
    return problems


def _options_of(place: str, config: type[BaseModel], spec: Named) -> list[str]:
    try:
        config(**spec.options)
    except ValidationError as error:
        return lines_of(error, config, place, also=type(spec).model_fields)
    return []
