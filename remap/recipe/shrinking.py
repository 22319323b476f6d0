"""The short form of a student that is cut from its teacher: ``shrink(teacher, depth=6, width=384)``."""

import re
from collections.abc import Mapping
from typing import Any

_WORD = re.compile(r"\s*shrink\s*\((?P<inside>[^()]*)\)\s*")
_OPTION = re.compile(r"\s*(?P<key>[a-z_]+)\s*=\s*(?P<value>[0-9]{1,9}|[a-z_]+)\s*")
EXAMPLE = "shrink(teacher, depth=6, width=384, heads=6, mlp=1536)"


def is_shrink_word(word: Any) -> bool:
    """Whether a model's name is meant as the short form, right or wrong."""
    return isinstance(word, str) and re.match(r"\s*shrink\s*(\(|$)", word) is not None


def read_shrink_word(word: str) -> dict[str, Any]:
    """The options in a short form; their names and values are for the schema to check.

    Raises:
        ValueError: It is not ``shrink(teacher, key=value, ...)``, or names a key twice.
    """
    whole = _WORD.fullmatch(word)
    first, *others = whole["inside"].split(",") if whole else ("",)
    if first.strip() != "teacher":
        raise ValueError(f"'{word}' cannot be read (write {EXAMPLE})")
    found: dict[str, Any] = {}
    for other in others:
        option = _OPTION.fullmatch(other)
        if option is None:
            raise ValueError(f"'{other.strip()}' in '{word}' cannot be read (write {EXAMPLE})")
        if option["key"] in found:
            raise ValueError(f"'{option['key']}' is given twice in '{word}'")
        found[option["key"]] = int(option["value"]) if option["value"].isdigit() else option["value"]
    return found


def shrink_word(options: Mapping[str, Any]) -> str:
    """The short form of some options."""
    return f"shrink({', '.join(['teacher', *(f'{key}={value}' for key, value in options.items())])})"
