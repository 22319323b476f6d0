"""Pydantic's findings as one plain line each: the key, the problem, and the word that was probably meant."""

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from remap.errors import RecipeError
from remap.io.names import plain
from remap.registry import did_you_mean, nearest

# Where pydantic speaks of Python classes, a recipe has plainer things.
_SHAPES = {"model_type": "a mapping of keys", "dict_type": "a mapping of keys", "tuple_type": "a list"}
# Sections that a name alone may stand for.
_NAMED = ("MethodSpec", "LossSpec", "InitSpec", "StudentSpec", "TeacherSpec")
# And where it speaks of types, plain words: what was given follows anyway.
_WORDS = {
    ", unable to parse string as an integer": "",
    ", unable to parse string as a number": "",
    ", got a number with a fractional part": "",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "a text",
}

Section = TypeVar("Section", bound=BaseModel)


def checked(kind: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """Return a section by itself.

    Raises:
        RecipeError: Its values are refused; it names ``where`` they come from.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise RecipeError([plain(line.removeprefix("recipe: ")) for line in lines_of(error, kind)], where) from None


def as_list_of_texts(name: str, texts: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the texts of a list.

    Raises:
        RecipeError: It is one text, which Python would read letter by letter.
    """
    if isinstance(texts, str):
        raise RecipeError([f"{name}: should be a list, got one text (write ['{texts}'])"], where)
    return tuple(texts)


def lines_of(error: ValidationError, schema: type[BaseModel], key: str = "", also: Iterable[str] = ()) -> list[str]:
    """Return one line per finding, in the order of the recipe; ``also`` are further keys that are allowed.

    Where several kinds of values are allowed, pydantic has a finding for each kind: they become one line.
    """
    findings = error.errors()
    paths = [tuple(_path(finding)) for finding in findings]
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for finding, path in zip(findings, paths, strict=True):
        # A list whose items are wrong also counts as too short, and as none of the words that could stand for it.
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in paths)
        if not inside or finding["type"] not in ("too_short", "literal_error"):
            groups.setdefault(path, []).append(finding)
    return [_line(group, schema, key, list(also)) for group in groups.values()]


def _path(finding: Any) -> list[Any]:
    *parents, last = finding["loc"] or ("",)
    path = [part for part in parents if not _is_union_label(part)]
    if finding["loc"] and (finding["type"] == "extra_forbidden" or not _is_union_label(last)):
        path.append(last)
    return path


def _line(group: list[Any], schema: type[BaseModel], key: str, also: list[str]) -> str:
    """Return one line for the findings at one key, of which there is one per kind of value that would do."""
    finding = next((one for one in group if one["type"] == "literal_error"), group[0])
    path = _path(finding)
    where = _dotted(path, key)
    kind, given = finding["type"], finding["input"]
    if kind == "extra_forbidden":
        known = [*also, *_fields_at(schema, path[:-1])]
        return f"{where}: unknown key{did_you_mean(str(path[-1]), known)} (allowed: {', '.join(known)})"
    if kind == "missing":
        if not isinstance(given, Mapping):  # a list that is too short, such as a pair of one number
            return f"{where}: missing, got {_shown(given)}"
        others = [key for key in given if key not in _fields_at(schema, path[:-1])]
        meant = nearest(str(path[-1]), others)
        if not meant and path[-1] == "name" and others:
            return f"{where}: missing; it says of what these are options: {', '.join(map(str, others))}"
        return f"{where}: missing" + (f"; did you write '{meant}' for it?" if meant else "")
    if kind == "literal_error":
        allowed = finding["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        hint = did_you_mean(str(given), allowed.split(", "))
        other = ", and no list" if any(one["type"] == "tuple_type" for one in group) else ""
        return f"{where}: '{str(given)[:60]}' is not one of {allowed}{other}{hint}"
    if kind == "string_pattern_mismatch":
        rule = "letters, digits, '.', '_' and '-' only, 64 at most, a letter or digit first"
        return f"{where}: {_shown(given)} may hold {rule}"
    messages = list(dict.fromkeys(map(_message, group)))
    message = " or ".join([messages[0], *(message.removeprefix("should be ") for message in messages[1:])])
    hint = f"; write [{given}]" if kind == "tuple_type" and isinstance(given, str) and given else ""
    # A check of a whole section names the values that it is about.
    says_it = ", got " in message or (kind == "value_error" and isinstance(given, Mapping))
    got = "" if says_it else f", got {_shown(given)}"
    return f"{where}: {message}{got}{hint}"


def _message(finding: Any) -> str:
    kind = finding["type"]
    named = finding.get("ctx", {}).get("class_name") in _NAMED
    shape = "a name, or a mapping of keys" if named else _SHAPES.get(kind)
    message = f"should be {shape}" if shape is not None else finding["msg"].removeprefix("Value error, ")
    if not message[:2].isupper():  # a name such as ATLoss stays as it is
        message = message[0].lower() + message[1:]
    message = message.replace("input should be", "should be")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message


def _shown(given: Any) -> str:
    if given is None:
        return "nothing"
    return repr(given) if len(repr(given)) <= 60 else f"{repr(given)[:57]}..."


def _is_union_label(part: Any) -> bool:
    """Pydantic adds the names of its validators and union members to the path; they mean nothing to a reader."""
    return isinstance(part, str) and ("[" in part or part in {"bool", "int", "float", "str", "list", "tuple"})


def _dotted(path: list, key: str) -> str:
    text = key
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text or "recipe"


def _fields_at(schema: type[BaseModel], path: list[Any]) -> Iterable[str]:
    for part in path:
        if not isinstance(part, int):
            field = schema.model_fields.get(part)
            inner = _model_in(field.annotation) if field else None
            if inner is None:
                return ()
            schema = inner
    return getattr(schema, "WRITTEN", schema.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model inside ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for inner in typing.get_args(annotation):
            found = _model_in(inner)
            if found:
                return found
    return None
