"""What a user writes to name images: a path, or NAME:REST,KEY=VALUE of a source. Imports neither torch nor numpy."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from remap.data import SOURCES, is_source
from remap.errors import DataError
from remap.io.paths import absolute, expanded
from remap.registry import did_you_mean

_PATH_OPTIONS = ("folder", "root")


@dataclass(frozen=True)
class Word:
    """The parts of a word; a path alone is ``rest``, without name and options."""

    name: str
    rest: str
    options: dict[str, str]


def parsed(word: str) -> Word:
    """Return the parts of a word.

    Raises:
        DataError: The source has no such option, or the word names nothing after "NAME:".
    """
    found = parts_of(word)
    if not found.name or not (row := SOURCES.row(found.name)).takes:
        return found
    for key in found.options:
        if key not in row.options:
            text = f"the source '{row.name}' has no option '{key}'{did_you_mean(key, row.options)}"
            raise DataError(text, given=word, allowed=row.options or "none")
        if not found.options[key]:
            raise DataError(f"the option '{key}' has no value", given=word)
    if not found.rest:
        raise DataError(f"'{row.name}:' is not followed by a {row.takes}", given=word)
    return found


def parts_of(word: str) -> Word:
    """Return the parts of a word, whatever its options are."""
    if not is_source(word):
        return Word("", word, {})
    name, _, rest = word.partition(":")
    if not SOURCES.row(name).takes or os.path.lexists(expanded(rest)):  # a path may look like an option
        return Word(name, rest, {})
    rest, *options = re.split(r",(?=[a-z_]+=)", rest)
    return Word(name, rest, dict(option.split("=", 1) for option in options))


def of_images(word: str) -> str:
    """Return a word for images whose labels do not matter: the name of a source alone is then a folder."""
    return f"./{word}" if ":" not in word and is_source(word) else word


def with_absolute_paths(word: str) -> str:
    """Return a word whose paths are absolute; names of sources, and what only they understand, stay."""
    found = parts_of(word)
    if not found.name:
        return absolute(word)
    if not SOURCES.row(found.name).takes:
        return word
    return _with_paths(found, absolute, _is_path(found))


def below(folder: Path, word: str) -> str:
    """Return a word whose paths lie below a folder; names of sources, and what only they understand, stay."""
    found = parts_of(word)
    if not found.name:
        return str(folder / word)
    takes = SOURCES.row(found.name).takes
    is_path = takes == "path" or (takes == "path or name" and (folder / found.rest).exists())
    return _with_paths(found, lambda path: str(folder / path), is_path) if takes else word


def _with_paths(found: Word, change: Callable[[str], str], is_path: bool) -> str:
    rest = change(found.rest) if is_path else found.rest
    options = {key: change(value) if key in _PATH_OPTIONS else value for key, value in found.options.items()}
    return f"{found.name}:{rest}" + "".join(f",{key}={value}" for key, value in options.items())


def place_of(word: str) -> Path:
    """Return the absolute path that a word leads to; for a name of other data a path that no file has."""
    found = parts_of(word)
    return Path(absolute(found.rest)) if _is_path(found) else Path(f"/{found.name}:", found.rest)


def _is_path(found: Word) -> bool:
    takes = SOURCES.row(found.name).takes if found.name else "path"
    return bool(found.rest) and (takes == "path" or (takes == "path or name" and os.path.exists(expanded(found.rest))))
