"""From options, overrides and files to one checked recipe, or to one error that lists every problem."""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from remap.data import is_source
from remap.data.words import parts_of
from remap.errors import RecipeError
from remap.io.names import plain
from remap.recipe import catalogue, overrides, strict_yaml
from remap.recipe.checks import combination_problems, name_problems, option_problems, schedule_problems
from remap.recipe.option_listing import listed, options_of
from remap.recipe.overrides import WORDS
from remap.recipe.problems import lines_of
from remap.recipe.schema import DataSpec, Recipe, Section, StudentSpec, TeacherSpec, TrainSpec, as_list
from remap.tuning import METHODS, method_problems

__all__ = ["COMMAND_LINE", "WORDS", "dump", "load", "resolve", "resolve_distill", "validate"]

COMMAND_LINE = "command line"
# Shown at once.
MOST_PROBLEMS = 50
_TEACHERS = ("teacher", "teachers", "more_teachers")


def resolve(
    recipe: str | Path | None = None,
    words: Mapping[str, Any] | None = None,
    settings: Iterable[str] = (),
    *,
    start: Mapping[str, Any] | None = None,
    check_options: bool = True,
) -> Recipe:
    """Build a recipe.

    Args:
        recipe: A shipped name or a YAML file; None starts from the defaults.
        words: Keys of ``WORDS`` (None values are left out) and "weights" for both models.
        settings: "section.field=value" overrides, applied last.
        start: Plain values to start from, in place of the defaults.
        check_options: Check method and loss options too (imports torch).

    Raises:
        RecipeError: With every problem found, each with its key.
    """
    in_file: dict[str, Any] = {}
    where = COMMAND_LINE
    problems: list[str] = []
    later = overrides.of_settings(settings, problems)
    if recipe is not None:
        path = catalogue.find(str(recipe))
        where = str(path)
        try:
            in_file = strict_yaml.read_mapping(path)
        except RecipeError as error:
            raise RecipeError([*error.problems, *problems], where) from None
    values = deepcopy({**(start or {}), **in_file})
    if "teachers" in values:
        values["teacher"] = [*as_list(values.get("teacher")), *as_list(values.pop("teachers"))]
    given = [*overrides.of_words(words or {}, values, problems), *later]
    chosen = values.get("losses") is not None or any(chooses_losses(key) for key, _ in given)
    for key, value in given:
        overrides.apply(values, key, value, problems)
    if "name" not in values:
        values["name"] = _name_of(values.get("data"))
    result, found = _checked(values, check_options)
    problems += found
    if problems and recipe is not None:
        raise _blamed(problems, _checked(in_file, check_options)[1], where)
    if problems or result is None:
        raise _refusal(problems, where)
    if not chosen:  # a weight or option of kd alone chooses no losses, though it writes the default ones out
        result.model_fields_set.discard("losses")
    return result


def _blamed(problems: list[str], of_file: list[str], where: str) -> RecipeError:
    """Return an error that marks the problems the file alone does not have; they come from the command line."""
    if not set(problems) & set(of_file):
        return _refusal(problems, COMMAND_LINE)
    known = {*of_file, *(problem for problem in problems if problem.startswith("--"))}
    return _refusal([problem if problem in known else f"{problem} ({COMMAND_LINE})" for problem in problems], where)


def resolve_distill(
    recipe: str | Path | None, words: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
) -> Recipe:
    """Resolve with the embedded teacher and the shipped recipe of a built-in source as defaults."""
    words = dict(words or {})
    if recipe is not None:
        return resolve(recipe, words, settings)
    words["teacher"] = words.get("teacher") or "mini_teacher"
    source = words.get("data") or (None if words.get("unlabeled") else DataSpec().source)
    shipped = source if isinstance(source, str) and is_source(source) and source in catalogue.names() else None
    return resolve(shipped, words, settings)


def load(path: Path) -> Recipe:
    """Read the recipe in a YAML file."""
    return validate(strict_yaml.read_mapping(path), str(path))


def load_finished(path: Path) -> Recipe:
    """Read the recipe of a run that is done: combinations that are refused now may have worked when it was made."""
    return validate(strict_yaml.read_mapping(path), str(path), check_combinations=False)


def dump(recipe: Recipe) -> str:
    """Return YAML that ``load`` reads back to an equal recipe."""
    return strict_yaml.dump(recipe.model_dump(mode="json"))


def validate(
    values: Mapping[str, Any], where: str, *, check_options: bool = True, check_combinations: bool = True
) -> Recipe:
    """Check plain values against the schema and the tables.

    Raises:
        RecipeError: With every problem found.
    """
    result, found = _checked(values, check_options, check_combinations)
    if found or result is None:
        raise _refusal(found, where)
    return result


def _checked(
    values: Mapping[str, Any], check_options: bool, check_combinations: bool = True
) -> tuple[Recipe | None, list[str]]:
    """Return the recipe, if its fields are right, and every problem found; broken sections hide none of the others."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines = lines_of(error, Recipe)
        if sum(len(as_list(values.get(key))) for key in _TEACHERS) == 1:
            lines = [re.sub(r"^teachers\[0\]", "teacher", line) for line in lines]
        broken = {finding["loc"][0] for finding in error.errors() if finding["loc"]}
        broken |= {"task"} if "data" in broken else set()  # which is read into it
        sound = {key: value for key, value in values.items() if key not in broken}
        if "teachers" in broken:
            sound = {key: value for key, value in sound.items() if key not in _TEACHERS} | {"teacher": {}}
        others = _checked(sound, check_options)[1] if broken else []
        return None, _with_sections(lines, values, check_options=check_options) + others
    checks = (
        (name_problems, True),
        (combination_problems, check_combinations),
        (option_problems, check_options),
        (schedule_problems, check_options and check_combinations),
    )
    return recipe, [problem for check, wanted in checks if wanted for problem in check(recipe)]


def _refusal(problems: list[str], where: str) -> RecipeError:
    """Return an error of one line per problem, at most ``MOST_PROBLEMS``, without control characters."""
    lines = [plain(problem) for problem in problems[:MOST_PROBLEMS]]
    more = len(problems) - len(lines)
    return RecipeError([*lines, f"and {more:,} more"] if more else lines, where)


def _with_sections(lines: list[str], values: Mapping[str, Any], *, check_options: bool) -> list[str]:
    """Name the section of a key that stands at the top: ``lr`` is ``train.lr``."""
    sections: dict[str, type[Section]] = {
        "train": TrainSpec, "data": DataSpec, "student": StudentSpec, "teacher": TeacherSpec
    }  # fmt: skip
    keys = [f"{section}.{name}" for section, spec in sections.items() for name in spec.model_fields]
    method = overrides.method_of(values)
    if check_options and not method_problems("method", method):
        keys[:0] = [f"method.{row['name']}" for row in options_of(method)]
    found = []
    for line in lines:
        key, unknown, rest = line.partition(": unknown key")
        meant = [other for other in keys if unknown and other.rpartition(".")[2] == key]
        if meant:
            line = f"{key}{unknown}; did you mean {' or '.join(map(repr, meant))}?{rest[rest.index(' (allowed') :]}"
        elif unknown and check_options and (owners := _owners(key)):
            others = f"{', '.join(owners[:3])}{' and others' if len(owners) > 3 else ''}"
            line = f"{key}{unknown}; 'method.{key}' is an option of {others}, not of {method}"
        found.append(line)
    return found


def _owners(option: str) -> list[str]:
    """Return the methods that have an option of this name."""
    return [row.name for row in METHODS if any(one["name"] == option for one in listed(METHODS, row.name)["options"])]


def chooses_losses(key: str) -> bool:
    """Whether a key is the list of losses, or of the one that may be left out by default."""
    return key == "losses" or key.startswith("losses.attention.")


def _name_of(data: Any) -> str:
    """Name a recipe after its data: photos/train.tar gives "train"."""
    source = (data.get("source") or data.get("unlabeled")) if isinstance(data, dict) else None
    stem = Path(parts_of(source).rest or source).name.partition(".")[0] if isinstance(source, str) else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64]
    return name or Recipe().name
