"""From words, overrides and files to one checked recipe, or to one error that lists every problem."""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from remap.errors import RecipeError
from remap.recipe import catalogue, strict_yaml
from remap.recipe.checks import name_problems, option_problems
from remap.recipe.problems import lines_of
from remap.recipe.schema import DEFAULT_LOSSES, Recipe, loss_words
from remap.registry import did_you_mean

# Words of the command line and the field each one sets.
WORDS = {
    "teacher": "teacher.model",
    "student": "student.model",
    "method": "method",
    "losses": "losses",
    "data": "data.source",
    "val_data": "data.val_source",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "seed": "seed",
    "skip_bad": "data.skip_bad",
    "processes": "train.processes",
}


def resolve(
    recipe: str | Path | None = None,
    words: Mapping[str, Any] | None = None,
    settings: Iterable[str] = (),
    *,
    check_options: bool = True,
) -> Recipe:
    """Build a recipe.

    Args:
        recipe: A shipped name or a YAML file; None starts from the defaults.
        words: Keys of ``WORDS`` (None values are left out) and "weights" for both models.
        settings: "section.field=value" overrides, applied last.
        check_options: Check method and loss options too (imports torch).

    Raises:
        RecipeError: With every problem found, each with its place.
    """
    values: dict[str, Any] = {}
    where = "command line"
    problems: list[str] = []
    later = _settings(settings, problems)
    if recipe is not None:
        path = catalogue.find(str(recipe))
        where = str(path)
        try:
            values = strict_yaml.read_mapping(path)
        except RecipeError as error:
            raise RecipeError([*error.problems, *problems], where) from None
    for place, value in _words(words or {}, problems, values) + later:
        _assign(values, place, value, problems)
    if "name" not in values:
        values["name"] = _name_of(values.get("data"))
    return validate(values, where, problems, check_options=check_options)


def resolve_distill(
    recipe: str | Path | None, words: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
) -> Recipe:
    """``resolve`` with the embedded default where nothing else is said: its teacher, and on the digits its recipe."""
    words = dict(words or {})
    if recipe is None:
        recipe = "digits" if words.get("data") in (None, "digits") else None
        words["teacher"] = words.get("teacher") or "mini_teacher"
    return resolve(recipe, words, settings)


def _name_of(data: Any) -> str:
    """A recipe without a name is called after its data: photos/train.tar gives "train"."""
    source = data.get("source") if isinstance(data, dict) else None
    stem = Path(source).expanduser().name.partition(".")[0] if isinstance(source, str) else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64]
    return name or Recipe().name


def validate(
    values: Mapping[str, Any], where: str, problems: Iterable[str] = (), *, check_options: bool = True
) -> Recipe:
    """Check plain values against the schema and the tables."""
    found = list(problems)
    try:
        result = Recipe.model_validate(values)
    except ValidationError as error:
        found += lines_of(error, Recipe)
        found += _problems_of_parts(values, check_options=check_options)
        raise RecipeError(found, where) from None
    found += name_problems(result)
    if check_options:
        found += option_problems(result)
    if found:
        raise RecipeError(found, where)
    return result


def load(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    return validate(strict_yaml.read_mapping(path), str(path))


def dump(recipe: Recipe) -> str:
    """YAML that ``load`` reads back to an equal recipe."""
    return strict_yaml.dump(recipe.model_dump(mode="json"))


def _problems_of_parts(values: Mapping[str, Any], *, check_options: bool) -> list[str]:
    """Unknown names and options are reported beside broken fields, by checking the parts that can stand alone."""
    lines: list[str] = []
    for key in ("method", "losses", "teacher", "train"):
        alone = {key: values.get(key)} if key in values else {}
        if key == "losses" and values.get("teacher") is not None:
            alone["teacher"] = {}
        try:
            part = Recipe.model_validate(alone)
        except ValidationError:
            continue
        lines += name_problems(part)
        lines += option_problems(part) if check_options and key in ("method", "losses") else []
    return lines


def _words(words: Mapping[str, Any], problems: list[str], values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    known = (*WORDS, "weights")
    for word in words:
        if word not in known:
            problems.append(f"{word}: unknown word{did_you_mean(word, known)} (allowed: {', '.join(known)})")
    pairs = [(WORDS[word], value) for word, value in words.items() if word in WORDS and value is not None]
    if words.get("weights") is not None:
        pairs.append(("student.weights", words["weights"]))
        if words.get("teacher") is not None or values.get("teacher") is not None:
            pairs.append(("teacher.weights", words["weights"]))
    return pairs


def _settings(settings: Iterable[str], problems: list[str]) -> list[tuple[str, Any]]:
    """Sections before their fields, so that the order of ``teacher=x`` and ``losses.kd.weight=2`` does not matter."""
    pairs = []
    for setting in settings:
        place, equals, text = setting.partition("=")
        if not equals or not all(part.strip() for part in place.split(".")):
            problems.append(f"--set {setting}: write section.field=value")
            continue
        try:
            pairs.append((place.strip(), strict_yaml.parse(text, f"--set {setting}")))
        except RecipeError as error:
            problems += [f"{error.where}: {problem}" for problem in error.problems]
    return sorted(pairs, key=lambda pair: pair[0].count("."))


def _assign(values: dict[str, Any], place: str, value: Any, problems: list[str]) -> None:
    """Set a dotted field; ``losses.kd.weight`` reaches into the list by name, ``method`` given as a word keeps none
    of another method's options."""
    *parents, last = place.split(".")
    here: Any = values
    for index, part in enumerate(parents):
        here = _step(here, part, values if index == 0 else None)
        if here is None:
            problems.append(f"{place}: there is no '{part}' to set a field of")
            return
    if not isinstance(here, dict):
        problems.append(f"{place}: cannot be set")
        return
    here[last] = deepcopy(value)


def _step(here: Any, part: str, root: dict[str, Any] | None) -> Any:
    if isinstance(here, list):
        return next((item for item in here if isinstance(item, dict) and item.get("name") == part), None)
    if not isinstance(here, dict):
        return None
    child = here.get(part)
    if part == "losses" and root is not None:
        child = here["losses"] = _losses_as_list(child, root)
        return child
    if child is None:
        child = here[part] = {"name": Recipe().method.name} if part == "method" and root is not None else {}
    elif isinstance(child, str):
        child = here[part] = {"name" if part == "method" else "model": child}
    return child


def _losses_as_list(value: Any, root: Mapping[str, Any]) -> Any:
    """The losses as a list of mappings; what cannot be read so is left for the schema to report."""
    if value is None:
        value = list(DEFAULT_LOSSES if root.get("teacher") is not None else ("ce",))
    try:
        return list(loss_words(value)) if isinstance(value, (str, list)) else value
    except ValueError:
        return value
