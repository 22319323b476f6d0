"""Options of methods and losses as plain values for listings: type, default, limits and description."""

import types
import typing
from typing import Any

from pydantic import BaseModel

from remap.tuning import config_of, parts_of
from remap.tuning.base import Options

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


def options_of(method: str) -> list[dict[str, Any]]:
    """Return one row per option of a method, as ``rows_of_config``; ``part.name`` in a combination. Imports torch.

    Raises:
        UnknownName: The method is in no table.
    """
    parts = parts_of(method)
    return [
        {**row, "name": row["name"] if len(parts) == 1 else f"{part}.{row['name']}"}
        for part in parts
        for row in rows_of_config(config_of(part))
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
    notes = {part: _notes(config_of(part)) for part in parts}
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
