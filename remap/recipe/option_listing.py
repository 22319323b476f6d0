"""Options of methods and losses as plain values for listings: type, default, limits and description.

Those of this repository are also in options.json, which ``tools/reference_pages.py`` writes from the classes: a listing
need not import them, and with them torch.
"""

import json
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from remap.registry import BUILT_IN, LATER, MAY_BE_PATH, Registry
from remap.tuning import METHODS, parts_of

TABLE = Path(__file__).with_name("options.json")
_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
_MEANING = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
# Types of values that a row of options.json describes completely, with its words and limits.
_KINDS = {"whole number": (int,), "number": (int, float), "true or false": (bool,), "word": (str,)}


def listed(table: Registry[Any], name: str) -> dict[str, Any]:
    """Return what ``described`` says of a row's options; only a row of another package is imported for it.

    Raises:
        UnknownName: There is no such row.
    """
    row = table.row(name)
    return _table()[f"{table.kind} {name}"] if row.origin == BUILT_IN else described(row.load().Config)


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def described(config: type[BaseModel]) -> dict[str, Any]:
    """Return ``options`` (see ``rows_of_config``), ``notes``, and the ``plain`` options.

    Plain is an option whose type, words and limits say all that is checked.
    """
    own = config.__pydantic_decorators__
    plain: Iterable[str] = () if own.model_validators or own.field_validators else config.model_fields
    return {
        "options": rows_of_config(config),
        "notes": _notes(config),
        "plain": [name for name in plain if _is_plain(config.model_fields[name])],
    }


def _is_plain(field: Any) -> bool:
    rules = [rule for rule in field.metadata if rule is not LATER and rule is not MAY_BE_PATH]
    limits = all(type(rule).__name__ in ("Ge", "Gt", "Le", "Lt") for rule in rules)
    return limits and _type(field.annotation) in _KINDS


def surely_valid(table: Registry[Any], name: str, options: Mapping[str, Any]) -> bool:
    """Return whether options are right by their rows alone; if not, only their class can tell. Imports no torch."""
    known = listed(table, name) if options else {"plain": [], "options": []}
    rows = {row["name"]: row for row in known["options"] if row["name"] in known["plain"]}
    return all(option in rows and _fits(rows[option], value) for option, value in options.items())


def _fits(row: Mapping[str, Any], value: Any) -> bool:
    if type(value) not in _KINDS[row["type"]]:
        return False
    rules = (rule.split() for rule in filter(None, row["limits"].split(", ")))
    return all(_MEANING[sign](value, float(limit)) for sign, limit in rules) and value in (row["allowed"] or [value])


def options_of(method: str) -> list[dict[str, Any]]:
    """Return one row per option of a method, as ``rows_of_config``; ``part.name`` in a combination.

    Raises:
        UnknownName: The method is in no table.
    """
    parts = parts_of(method)
    return [
        {**row, "name": row["name"] if len(parts) == 1 else f"{part}.{row['name']}"}
        for part in parts
        for row in listed(METHODS, part)["options"]
    ]


def rows_of_config(config: type[BaseModel]) -> list[dict[str, Any]]:
    """Return one row per option, in the order of the class.

    The keys are name, type, default, allowed (a list of words, or None), limits and about (the description).
    """
    rows = []
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        rows.append(
            {
                "name": name,
                "type": _type(field.annotation),
                "default": list(default) if isinstance(default, tuple) else default,
                "allowed": _words(field.annotation) or None,
                "limits": _limits(field.metadata),
                "about": field.description or "",
            }
        )
    return rows


def notes_of(method: str) -> str:
    """Return what the docstring of the options' class adds to the options; of a combination each part's."""
    parts = parts_of(method)
    notes = {part: listed(METHODS, part)["notes"] for part in parts}
    if len(parts) == 1:
        return notes[parts[0]]
    return " ".join(f"{part}: {text}" for part, text in notes.items() if text)


def shown(value: Any) -> str:
    """Return a value as it is written after ``--set method.OPTION=``."""
    if value is None:
        return "null"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _notes(config: type[BaseModel]) -> str:
    """Return the first docstring of the class and its bases that says more than "Options."."""
    from remap.tuning.base import Options  # imports torch

    bases = [base for base in config.__mro__ if issubclass(base, Options) and base is not Options]
    docs = [" ".join((base.__doc__ or "Options").split()) for base in bases]
    return next((doc for doc in docs if not doc.startswith("Options")), "")


def _words(annotation: Any) -> list[Any]:
    """Return the words of every ``Literal`` in an annotation."""
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(inside)
    return [word for one in inside for word in _words(one)]


def _type(annotation: Any) -> str:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inside[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, inside))
    if origin is tuple:
        return "list"
    if origin is typing.Literal:
        return "word" if isinstance(inside[0], str) else "whole number"
    return _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limits(metadata: list[Any]) -> str:
    limits = ((sign, getattr(rule, key, None)) for rule in metadata for key, sign in _LIMITS.items())
    return ", ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)
