"""Options of the command line and ``--set`` as changes of a recipe's plain values."""

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from pydantic import ValidationError

from remap.backbones.names import SHORT_NAMES
from remap.errors import RecipeError
from remap.io.human_size import number_of
from remap.recipe import strict_yaml
from remap.recipe.schema import EMA, OF_OTHERS, SELF, Recipe, as_list, default_losses, loss_words
from remap.registry import did_you_mean
from remap.remapping import LOSSES
from remap.remapping.architecture.shrink_options import is_shrink_word

# Options of the command line and the key each one sets; "weights" sets those of both models.
WORDS = {
    "teacher": "teacher.model",
    "student": "student.model",
    "init": "student.init",
    "force_init": "student.force_init",
    "method": "method",
    "losses": "losses",
    "data": "data.source",
    "val_data": "data.val_source",
    "unlabeled": "data.unlabeled",
    "target": "data.target",
    "classes": "data.classes",
    "templates": "data.templates",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "seed": "seed",
    "skip_bad": "data.skip_bad",
    "processes": "train.processes",
    "track": "train.track",
}
# A dotted key and its value.
Override = tuple[str, Any]


def of_settings(settings: Iterable[str], problems: list[str]) -> list[Override]:
    """Read "section.field=value" texts, sections before their fields: the order in which they are given is free."""
    overrides = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            problems.append(f"--set {setting}: write section.field=value")
            continue
        if not text.strip():  # as of a variable that is not set; YAML would read null
            problems.append(f"--set {setting}: got nothing after '=' (to set no value, write {key.strip()}=null)")
            continue
        first, *rest = key.strip().split(".")
        key = ".".join(["teacher" if first == "teachers" else first, *rest])
        try:
            overrides.append((key, strict_yaml.parse(text, f"--set {setting}")))
        except RecipeError as error:
            problems += [f"{error.where}: {problem}" for problem in error.problems]
    return _sections_first(overrides)


def of_words(words: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> list[Override]:
    """Read options of the command line as overrides of ``values``; in Python an option may hold a whole section."""
    known = (*WORDS, "weights")
    problems += [
        f"{word}: unknown word{did_you_mean(word, known)} (allowed: {', '.join(known)})"
        for word in words
        if word not in known
    ]
    weights, teacher = words.get("weights"), words.get("teacher")
    overrides = [
        (_key(word, value), value)
        for word, value in words.items()
        if word in WORDS and value is not None and not (word == "teacher" and isinstance(value, str))
    ]
    teachers = _teachers(teacher, problems) if isinstance(teacher, str) else []
    if teachers:
        overrides += _of_teachers(teachers, values, weights)
    if weights is not None:
        student = words.get("student") or _student_in(values)
        if not is_shrink_word(student):  # it has its teacher's
            overrides.append(("student.weights", weights))
        if (teacher or _teachers_in(values)) and not (teachers and _is_student(teachers[0])):
            overrides.append(("teacher.weights", weights))
    return _sections_first(overrides)


def _sections_first(overrides: list[Override]) -> list[Override]:
    return sorted(overrides, key=lambda override: override[0].count("."))


def _key(word: str, value: Any) -> str:
    """Return the key of an option: its field, or the section around it if the value is a whole one."""
    section, _, field = WORDS[word].partition(".")
    whole = isinstance(value, Mapping) or (word == "teacher" and isinstance(value, (list, tuple)))
    return section if whole and field in ("model", "source") else WORDS[word]


def _teachers(word: str, problems: list[str]) -> list[dict[str, Any]]:
    """Read "vit_large,dinov2_base:0.5" as sections; an existing path is one model, even with a comma in it."""
    if os.path.exists(os.path.expanduser(word.removeprefix("local-dir:"))):
        return [{"model": word}]
    teachers: list[dict[str, Any]] = []
    for part in (part.strip() for part in word.split(",")):
        model, colon, weight = part.rpartition(":")
        try:
            teachers.append({"model": model, "weight": float(weight)} if colon else {"model": part})
        except ValueError:
            teachers.append({"model": part})
            if model in SHORT_NAMES:  # other words may have a colon of their own
                problems.append(f"teacher: the weight after the colon must be a number, got '{weight}'")
    if not all(spec["model"] for spec in teachers):
        problems.append(f"teacher: a name is missing in '{word}'")
    return [spec for spec in teachers if spec["model"]]


def _of_teachers(teachers: list[dict[str, Any]], values: dict[str, Any], weights: Any) -> list[Override]:
    """Return the overrides of named teachers, which replace all others; the first has the recipe's other options."""
    first, *others = teachers
    overrides: list[Override] = [(f"teacher.{key}", value) for key, value in first.items()]
    if others or len(_teachers_in(values)) > 1:
        values["teacher"] = as_list(values.get("teacher"))[:1]
        more = [spec if weights is None or _is_student(spec) else {**spec, "weights": weights} for spec in others]
        overrides.append(("more_teachers", more))
    if _is_student(first):  # what a recipe says about preparing its own teacher is not meant for the student
        overrides += [("teacher.prepare", "probe"), *((f"teacher.{name}", None) for name in OF_OTHERS)]
    return overrides


def _student_in(values: Mapping[str, Any]) -> Any:
    """Return the student that a recipe names, in one of its spellings."""
    student = values.get("student")
    return student.get("model") if isinstance(student, Mapping) else student


def _teachers_in(values: Mapping[str, Any]) -> list[Any]:
    return [*as_list(values.get("teacher")), *as_list(values.get("more_teachers"))]


def _is_student(spec: Mapping[str, Any]) -> bool:
    return spec["model"] in (SELF, EMA)


def apply(values: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    """Set a dotted key.

    ``losses.kd.weight`` reaches into the list by name, ``teacher.prepare`` is that of the first teacher and
    ``teacher.2.prepare`` that of the second; ``method`` given as a word has none of another method's options, and all
    of its own.
    """
    own = values.get("method")
    if key == "method" and isinstance(own, dict) and own.get("name") == value:
        return
    *parents, last = key.split(".")
    here: Any = values
    if parents[:1] == ["teacher"] and len(parents) > 1 and parents[1].isdecimal():
        count = len(_teacher_places(values))
        if not 1 <= int(parents[1]) <= count:
            problems.append(f"{key}: there are {number_of(count, 'teacher')}, counted from 1")
            return
        here, parents = _mapping(*_teacher_places(values)[int(parents[1]) - 1]), parents[2:]
    for depth, part in enumerate(parents):
        here = _inside(here, part) if depth or here is not values else _section(values, part)
        if here is None:
            problems.append(f"{key}: there is no '{part}' to set a field of{_hint(parents, values)}")
            return
    if not isinstance(here, dict):
        problems.append(f"{key}: cannot be set")
        return
    here[last] = deepcopy(value)


def _section(values: dict[str, Any], part: str) -> Any:
    if part == "losses":
        values["losses"] = _losses_as_list(values)
        return values["losses"]
    if part == "teacher" and isinstance(values.get("teacher"), (list, tuple)):
        values["teacher"] = list(values["teacher"]) or [None]
        return _mapping(values["teacher"], 0)
    return _mapping(values, part, {"name": Recipe().method.name} if part == "method" else None)


def _teacher_places(values: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return where each teacher stands: a holder, and its key or index in it."""
    places: list[tuple[Any, Any]] = []
    for key in ("teacher", "more_teachers"):
        if isinstance(values.get(key), (list, tuple)):
            values[key] = list(values[key])
            places += [(values[key], index) for index in range(len(values[key]))]
        elif values.get(key) is not None:
            places.append((values, key))
    return places


def _inside(here: Any, part: str) -> Any:
    if isinstance(here, list):
        return next((item for item in here if isinstance(item, dict) and item.get("name") == part), None)
    return _mapping(here, part) if isinstance(here, dict) else None


def _mapping(holder: Any, key: str | int, default: dict[str, Any] | None = None) -> Any:
    """Return the section at a key, made from nothing or a single word if need be."""
    child = holder[key] if isinstance(key, int) else holder.get(key)
    if child is None:
        holder[key] = default or {}
    elif isinstance(child, str):
        holder[key] = {"name" if key in ("method", "init") else "model": child}
    return holder[key]


def _hint(parents: list[str], values: Mapping[str, Any]) -> str:
    """Return which losses a run has, and how one is added, for a loss that is not among them."""
    losses = values.get("losses")
    if parents[0] != "losses" or len(parents) != 2 or not isinstance(losses, list):
        return ""
    own = [loss for loss in losses if isinstance(loss, dict) and isinstance(loss.get("name"), str)]
    names, given = ",".join(loss["name"] for loss in own), ",".join(map(_with_weight, own))
    return f" (the losses are {names}; name them all: --losses {given},{parents[1]})" if names else ""


def _with_weight(loss: Mapping[str, Any]) -> str:
    """Return the word of a loss, with the weight that it would not have by its name alone: "ce:0.1"."""
    name, weight = loss["name"], loss.get("weight")
    usual = LOSSES.row(name).weight if name in LOSSES else 1.0
    return name if weight in (None, usual) or not isinstance(weight, int | float) else f"{name}:{weight:g}"


def method_of(values: Mapping[str, Any]) -> str:
    """Return the name of the method in plain values, right or wrong."""
    method = values.get("method", Recipe().method.name)
    return str(method.get("name") if isinstance(method, dict) else method)


def _losses_as_list(values: Mapping[str, Any]) -> Any:
    """Return the losses as a list of mappings; what cannot be read so is left for the schema to report."""
    losses = values.get("losses")
    if losses is None:
        losses = _default_losses(values)
    try:
        return list(loss_words(losses)) if isinstance(losses, (str, list)) else losses
    except ValueError:
        return losses


def _default_losses(values: Mapping[str, Any]) -> list[Any]:
    """Return the losses of a recipe that chooses none; while a section cannot be read, those of its method."""
    try:
        recipe = Recipe.model_validate({key: value for key, value in values.items() if key != "losses"})
    except ValidationError:
        losses = default_losses(method_of(values), teacher=bool(_teachers_in(values)))
    else:
        losses = recipe.losses
    return [loss.model_dump(mode="json") for loss in losses]
