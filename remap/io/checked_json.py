"""JSON from outside that is only data: no key twice, no NaN or Infinity, a bounded size."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remap.errors import RunError
from remap.io.checked_read import read_regular
from remap.io.names import plain

# Far beyond what remap writes (a million class names are some 20 MB), far below what fills a memory.
MOST_JSON_BYTES = 64 * 2**20


def read_json(path: str | Path, limit: int = MOST_JSON_BYTES) -> Any:
    """Return JSON from a regular file of at most ``limit`` bytes.

    Raises:
        ValueError: It cannot be read, or ``parse_json`` refuses it; the message is the reason, fit for a terminal.
    """
    try:
        return parse_json(read_regular(path, limit))
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    except ValueError as error:
        raise ValueError(plain(str(error))) from error


def read_run_json(path: Path) -> Any:
    """``read_json`` for the files of a run directory.

    Raises:
        RunError: It is missing or damaged.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise RunError(f"cannot read {path}: {error}", do="name a run directory that `remap` wrote") from error


def parse_json(data: bytes | str) -> Any:
    """Return JSON as RFC 8259 has it.

    Raises:
        ValueError: It is not that, a key is given twice, or it is nested deeper than Python reads.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        return json.loads(text, object_pairs_hook=_mapping, parse_constant=_not_a_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("too many levels deep") from None


def _mapping(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key[:40]!r} is given twice")
        values[key] = value
    return values


def _not_a_number(word: str) -> None:
    raise ValueError(f"{word} is not valid JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def is_number(value: object) -> bool:
    """Return whether it is a finite number; an integer also below 2**53, which every JSON reader keeps exactly."""
    return math.isfinite(value) if isinstance(value, float) else type(value) is int and abs(value) < 2**53


def is_count(value: object) -> bool:
    """Return whether it is an integer from 0, as ``is_number`` allows it."""
    return type(value) is int and 0 <= value < 2**53
