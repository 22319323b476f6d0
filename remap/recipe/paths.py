"""Which words of a recipe are paths, and how they become absolute. Nothing here touches what a path leads to."""

import os

from remap.backbones.names import is_weights_file
from remap.data.words import with_absolute_paths
from remap.io.names import name_problem
from remap.io.paths import LONGEST_PATH, absolute


def is_run(word: str) -> bool:
    """Whether a word names a run directory (or the task folder inside one)."""
    path = os.path.expanduser(word)
    return any(os.path.isfile(os.path.join(path, *parts)) for parts in (("task", "task.json"), ("task.json",)))


def require_path_or_name(word: str) -> str:
    """Return a word that may be a path or the name of a model.

    Raises:
        ValueError: It is empty, longer than any path, or holds what no readable path has.
    """
    if not word:
        raise ValueError("should not be empty")
    if len(word) > LONGEST_PATH:
        raise ValueError(f"is longer than any path ({LONGEST_PATH:,} characters)")
    unfit = name_problem(word)
    if unfit:
        raise ValueError(f"holds {unfit}")
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        raise ValueError("holds characters that no file name has") from None
    return word


def absolute_data(word: str) -> str:
    """Return data with absolute paths; the name of a source stays."""
    return with_absolute_paths(word)


def absolute_model(word: str) -> str:
    """Return a folder, a file of weights or a run directory as an absolute path; the name of a model stays."""
    start = next((start for start in ("local-dir:", "clip:local-dir:") if word.startswith(start)), None)
    if start is not None:
        return f"{start}{absolute(word.removeprefix(start))}"
    return absolute(word) if is_weights_file(word) or is_run(word) else word


def absolute_weights(word: str) -> str:
    """Return a weights file or run directory as an absolute path; "pretrained" and "none" stay."""
    return absolute(word) if is_weights_file(word) or is_run(word) else word
