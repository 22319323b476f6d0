"""From words, overrides and files to one checked recipe, or to one error that lists every problem."""

import os
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from remap.errors import RecipeError
from remap.io.names import plain
from remap.recipe import catalogue, strict_yaml
from remap.recipe.checks import method_problems, name_problems, option_problems
from remap.recipe.problems import lines_of, option_places
from remap.recipe.schema import (
    EMA,
    OF_OTHERS,
    SELF,
    DataSpec,
    Recipe,
    StudentSpec,
    TeacherSpec,
    TrainSpec,
    default_losses,
    loss_words,
    teachers_apart,
)
from remap.registry import did_you_mean
from remap.tuning import METHODS, config_of

COMMAND_LINE = "command line"
_MARK = f" ({COMMAND_LINE})"
# Shown at once.
MOST_PROBLEMS = 50
# Words of the command line and the field each one sets.
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
    where = COMMAND_LINE
    problems: list[str] = []
    later = _settings(settings, problems)
    if recipe is not None:
        path = catalogue.find(str(recipe))
        where = str(path)
        try:
            values = strict_yaml.read_mapping(path)
        except RecipeError as error:
            raise RecipeError([*error.problems, *problems], where) from None
    given = _words(words or {}, problems, values) + later
    chosen = values.get("losses") is not None or any(_chooses_losses(place) for place, _ in given)
    for place, value in given:
        _assign(values, place, value, problems)
    if "name" not in values:
        values["name"] = _name_of(values.get("data"))
    try:
        result = validate(values, where, problems, check_options=check_options)
    except RecipeError as error:
        raise _blamed(error, [place for place, _ in given]) from None
    if not chosen:  # a weight or option of kd alone chooses no losses, though it writes the default ones out
        result.model_fields_set.discard("losses")
    return result


def _chooses_losses(place: str) -> bool:
    """Whether a place is the list of losses, or of the one that may be left out by default."""
    return place == "losses" or place.startswith("losses.attention.")


def _blamed(error: RecipeError, given: list[str]) -> RecipeError:
    """The problems with what they come from: the file, or what was given beside it on the command line."""
    if error.where == COMMAND_LINE:
        return error
    mine = [_is_given(problem, given) for problem in error.problems]
    if all(mine):
        return RecipeError(error.problems, COMMAND_LINE)
    marked = [
        f"{problem}{_MARK}" if own and not problem.startswith("--") else problem
        for problem, own in zip(error.problems, mine, strict=True)
    ]
    return RecipeError(marked, error.where)


def _is_given(problem: str, given: list[str]) -> bool:
    """Whether a problem's place is one of the given places, or inside or around one of them."""
    if problem.startswith("--"):
        return True
    parts = re.sub(r"\[\d+\]", "", problem.partition(": ")[0]).split(".")
    for place in given:
        words = place.split(".")
        if words[0] == "losses" == parts[0]:  # the numbers of a list and the names on the command line do not compare
            return True
        if all(one == other for one, other in zip(parts, words, strict=False)):
            return True
    return False


def resolve_distill(
    recipe: str | Path | None, words: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
) -> Recipe:
    """``resolve`` with the embedded default where nothing else is said: its teacher, and on the digits its recipe."""
    words = dict(words or {})
    if recipe is not None:
        return resolve(recipe, words, settings)
    words["teacher"] = words.get("teacher") or "mini_teacher"
    try:
        return resolve("digits" if words.get("data") in (None, "digits") else None, words, settings)
    except RecipeError as error:  # nobody named the embedded recipe, so nothing is its fault
        raise RecipeError([problem.removesuffix(_MARK) for problem in error.problems], COMMAND_LINE) from None


def _name_of(data: Any) -> str:
    """A recipe without a name is called after its data: photos/train.tar gives "train"."""
    source = data.get("source") if isinstance(data, dict) else None
    stem = Path(source).name.partition(".")[0] if isinstance(source, str) else ""
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
        found += _with_sections(lines_of(error, Recipe), values, check_options=check_options)
        found += _problems_of_parts(values, check_options=check_options)
        raise _refusal(found, where) from None
    found += name_problems(result)
    if check_options:
        found += option_problems(result)
    if found:
        raise _refusal(found, where)
    return result


def _refusal(problems: list[str], where: str) -> RecipeError:
    """One line each, without what a terminal would take for more than letters; a heap of them is cut."""
    lines = [plain(problem) for problem in problems[:MOST_PROBLEMS]]
    more = len(problems) - len(lines)
    return RecipeError([*lines, f"and {more:,} more"] if more else lines, where)


def _with_sections(lines: list[str], values: Mapping[str, Any], *, check_options: bool) -> list[str]:
    """Where a key stands at the top that belongs to a section, the hint names its place: ``lr`` is ``train.lr``."""
    sections = {"train": TrainSpec, "data": DataSpec, "student": StudentSpec, "teacher": TeacherSpec}
    places = [f"{section}.{name}" for section, spec in sections.items() for name in spec.model_fields]
    method = values.get("method", Recipe().method.name)
    method = method.get("name") if isinstance(method, dict) else method
    if check_options and isinstance(method, str) and not method_problems("method", method):
        places[:0] = [f"method.{place}" for place in option_places(config_of(method))]
    found = []
    for line in lines:
        key, unknown, rest = line.partition(": unknown key")
        owners = _owners(key) if unknown and check_options and isinstance(method, str) else []
        meant = [place for place in places if place.rpartition(".")[2] == key]
        if unknown and meant:
            allowed = rest[rest.index(" (allowed") :]
            line = f"{key}{unknown}; did you mean {' or '.join(map(repr, meant))}?{allowed}"
        elif owners:
            others = f"{', '.join(owners[:3])}{' and others' if len(owners) > 3 else ''}"
            line = f"{key}{unknown}; 'method.{key}' is an option of {others}, not of {method}"
        found.append(line)
    return found


def _owners(option: str) -> list[str]:
    """The methods that have an option of this name."""
    return [row.name for row in METHODS if option in config_of(row.name).model_fields]


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
    pairs = [(_place(word, value), value) for word, value in words.items() if word in WORDS and value is not None]
    pairs.sort(key=lambda pair: pair[0].count("."))  # sections before their fields
    teachers = _teachers(words.get("teacher"))
    if any(not spec["model"] for spec in teachers):
        problems.append(f"teacher: a name is missing in '{words['teacher']}'")
        teachers = [spec for spec in teachers if spec["model"]]
    several = isinstance(values.get("teacher"), list) or values.get("more_teachers")
    if len(teachers) > 1 or "weight" in (teachers or [{}])[0] or (teachers and several):  # they are all of them
        pairs = [pair for pair in pairs if pair[0] != WORDS["teacher"]]
        pairs += [(f"teacher.{key}", value) for key, value in teachers[0].items()]
        pairs.append(("more_teachers", teachers[1:]))
    if _of_student(teachers):  # what a recipe says of preparing its own teacher is not meant for the student
        pairs.append(("teacher.prepare", "probe"))
        pairs += [(f"teacher.{name}", None) for name in OF_OTHERS]
    if words.get("weights") is not None:
        pairs.append(("student.weights", words["weights"]))
        if (words.get("teacher") is not None or values.get("teacher") is not None) and not _of_student(teachers):
            pairs.append(("teacher.weights", words["weights"]))
        for spec in teachers[1:]:
            spec |= {} if _of_student([spec]) else {"weights": words["weights"]}
    return pairs


def _place(word: str, value: Any) -> str:
    """Where a word's value goes: its field, or the section around it where a whole one is given (in Python)."""
    section, _, field = WORDS[word].partition(".")
    whole = isinstance(value, Mapping) or (word == "teacher" and isinstance(value, (list, tuple)))
    return section if whole and field in ("model", "source") else WORDS[word]


def _teachers(word: Any) -> list[dict[str, Any]]:
    """ "vit_large,dinov2_base:0.5" as sections; a path that is there is one model, whatever is in its name."""
    if not isinstance(word, str):
        return []
    if os.path.exists(os.path.expanduser(word.removeprefix("local-dir:"))):
        return [{"model": word}]
    found = []
    for part in (part.strip() for part in word.split(",")):
        model, colon, weight = part.rpartition(":")
        number = _number(weight) if colon else None
        found.append({"model": part} if number is None else {"model": model, "weight": number})
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _of_student(teachers: list[dict[str, Any]]) -> bool:
    return bool(teachers) and teachers[0]["model"] in (SELF, EMA)


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
            problems.append(f"{place}: there is no '{part}' to set a field of{_hint(parents, values)}")
            return
    if not isinstance(here, dict):
        problems.append(f"{place}: cannot be set")
        return
    here[last] = deepcopy(value)


def _hint(parents: list[str], values: Mapping[str, Any]) -> str:
    """A loss that is not among those of the run: which are, and how it comes in."""
    losses = values.get("losses")
    if parents[0] != "losses" or len(parents) != 2 or not isinstance(losses, list):
        return ""
    names = ",".join(str(loss.get("name")) for loss in losses if isinstance(loss, dict))
    return f" (the losses are {names}; name them all: --losses {names},{parents[1]})" if names else ""


def _step(here: Any, part: str, root: dict[str, Any] | None) -> Any:
    if isinstance(here, list):
        return next((item for item in here if isinstance(item, dict) and item.get("name") == part), None)
    if not isinstance(here, dict):
        return None
    if part == "teacher" and root is not None:
        here.update(teachers_apart(here))
    child = here.get(part)
    if part == "losses" and root is not None:
        child = here["losses"] = _losses_as_list(child, root)
        return child
    if child is None:
        child = here[part] = {"name": Recipe().method.name} if part == "method" and root is not None else {}
    elif isinstance(child, str):
        child = here[part] = {"name" if part in ("method", "init") else "model": child}
    return child


def _losses_as_list(value: Any, root: Mapping[str, Any]) -> Any:
    """The losses as a list of mappings; what cannot be read so is left for the schema to report."""
    if value is None:
        method = root.get("method", Recipe().method.name)
        method = method.get("name") if isinstance(method, dict) else method
        value = list(default_losses(str(method)) if root.get("teacher") is not None else ("ce",))
    try:
        return list(loss_words(value)) if isinstance(value, (str, list)) else value
    except ValueError:
        return value
