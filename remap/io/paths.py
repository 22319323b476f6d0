"""Paths from outside: expanded and made absolute without failing, and why nothing can be made at one."""

import os
from pathlib import Path

from remap.io.names import name_problem

# Linux's PATH_MAX.
LONGEST_PATH = 4096


def expanded(word: str | Path) -> Path:
    """Return a path with ``~`` replaced; ``~unknown``, which pathlib refuses, stays as it is."""
    return Path(os.path.expanduser(word))


def absolute(word: str | Path) -> str:
    """Return an absolute path without links; a circle of links, and what can be no path, stay as they are."""
    path = os.path.expanduser(word)
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL, or a character that no file name has
        return os.path.abspath(path)


def path_problem(path: str | Path) -> str | None:
    """Return why nothing can be made at a path (``expanded`` before); None where something can."""
    text = os.fspath(path)
    problem = name_problem(text)
    if problem:
        return f"it holds {problem}"
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return "it holds a character that no file name has"
    return f"no home folder is known for {text.split('/')[0]}" if text.startswith("~") else None
