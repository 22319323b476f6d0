"""Options of methods and losses as plain values for listings: types, defaults, limits, and what is said of them."""

import inspect
import re
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from remap.tuning import config_of, parts_of
from remap.tuning.base import Options

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}


def options_of(method: str) -> list[dict[str, Any]]:
    """One row an option of a method, as ``rows_of_config``; ``part.name`` in a combination. Imports torch.

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
    """One row an option, in the order of the class: name, type, default, allowed (a list of words, or None), limits
    and about."""
    about, rows = _about(config), []
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        rows.append(
            {
                "name": name,
                "type": _type(field.annotation),
                "default": None if default is PydanticUndefined else _json(default),
                "allowed": _allowed(field.annotation),
                "limits": _limits(field.metadata),
                "about": about.get(name, ""),
            }
        )
    return rows


def notes_of(method: str) -> str:
    """What the options' class says beside its attributes; of a combination each part's."""
    parts = parts_of(method)
    texts = {part: _summary(config_of(part)) for part in parts}
    if len(parts) == 1:
        return texts[parts[0]]
    return " ".join(f"{part}: {text}" for part, text in texts.items() if text)


def shown(value: Any) -> str:
    """A value as it is written after ``--set method.OPTION=``."""
    if value is None:
        return "null"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _docs(config: type[BaseModel]) -> list[str]:
    """What a class of options and those it builds on say of themselves, its own words first."""
    own = [base for base in config.__mro__ if issubclass(base, Options) and base is not Options]
    return [inspect.cleandoc(base.__doc__) for base in own if base.__doc__ and base.__doc__ != Options.__doc__]


def _summary(config: type[BaseModel]) -> str:
    """The sentences that are about no option in particular; the others stand beside their options."""
    text = " ".join(_parts(next(iter(_docs(config)), ""), config)[0].split())
    sentences = re.split(r"(?<=[.])\s+", text)
    first = next((index for index, sentence in enumerate(sentences) if "``" in sentence), len(sentences))
    return " ".join(sentences[:first])


def _parts(doc: str, config: type[BaseModel]) -> tuple[str, str]:
    """What is said of the class, and its list of options: under "Attributes:", or plain lines "option: ..."."""
    summary, heading, attributes = doc.partition("Attributes:")
    if heading:
        return summary, attributes
    options = "|".join(config.model_fields)
    start = re.search(rf"^(?:{options})(?:, \w+)*: ", doc, re.MULTILINE) if options else None
    if start is None:
        return doc, ""
    summary = doc[: start.start()].strip()
    return ("" if summary == "Options." else summary), doc[start.start() :]


def _about(config: type[BaseModel]) -> dict[str, str]:
    """A line an option: from the list of attributes, else the sentences or clauses that name it."""
    found: dict[str, str] = {}
    for doc in _docs(config):
        summary, attributes = _parts(doc, config)
        own: dict[str, str] = {}
        names: list[str] = []
        for line in attributes.splitlines():
            start = re.match(r"(?: {4})?(\w+(?:, \w+)*): (.*)", line)
            if start:
                names = start.group(1).split(", ")
                own |= dict.fromkeys(names, start.group(2).strip())
            elif line.strip():
                own |= {name: f"{own[name]} {line.strip()}" for name in names}
        clauses: list[str] = []
        for clause in re.split(r"(?<=[.;])\s+", " ".join(summary.split())):
            if clauses and clauses[-1].endswith(";") and "``" not in clause:
                clauses[-1] += f" {clause}"  # goes on about the same option
            else:
                clauses.append(clause)
        for option in config.model_fields:
            named = [
                clause.rstrip(".;").removeprefix(f"``{option}``: ") for clause in clauses if f"``{option}``" in clause
            ]
            if named:
                own.setdefault(option, "; ".join(named))
        found = own | found
    return {option: text.replace("``", "").rstrip(".") for option, text in found.items()}


def _members(annotation: Any) -> list[Any]:
    """The members of ``X | None`` and ``tuple[X, ...]`` that say something."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return [m for inner in typing.get_args(annotation) if inner is not Ellipsis for m in _members(inner)]
    return [annotation]


def _type(annotation: Any) -> str:
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(inner) for inner in typing.get_args(annotation))
    if origin is tuple:
        return "list"
    if origin is typing.Literal:
        return "word" if isinstance(typing.get_args(annotation)[0], str) else "whole number"
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _allowed(annotation: Any) -> list[Any] | None:
    words = [
        word
        for member in _members(annotation)
        if typing.get_origin(member) is typing.Literal
        for word in typing.get_args(member)
    ]
    return words or None


def _limits(metadata: list[Any]) -> str:
    parts = [
        f"{sign} {getattr(rule, key):g}"
        for rule in metadata
        for key, sign in _LIMITS.items()
        if getattr(rule, key, None) is not None
    ]
    return ", ".join(parts)


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
