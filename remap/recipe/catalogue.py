"""The recipes shipped with the package: the list is the folder."""

import errno
import os
from importlib.resources import files
from pathlib import Path

from remap.errors import RecipeError
from remap.io.checked_read import open_regular
from remap.io.paths import expanded
from remap.recipe import strict_yaml
from remap.registry import did_you_mean


def folder() -> Path:
    """Return the folder of shipped recipes."""
    return Path(str(files("remap_recipes")))


def names() -> list[str]:
    """Return the names of all shipped recipes, with their sub-folder."""
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find(word: str) -> Path:
    """Return a recipe's path: a file if the word ends in .yaml, else a shipped name.

    Raises:
        RecipeError: Neither exists, or it is not a readable file.
    """
    if word.endswith((".yaml", ".yml")):
        path = expanded(word)
        try:
            open_regular(path).close()
        except OSError as error:
            missing = error.errno == errno.ENOENT and not os.path.islink(path)
            raise RecipeError(["no such file" if missing else f"cannot be read: {error.strerror}"], word) from None
        return path
    if word in names():
        return folder() / f"{word}.yaml"
    hint = did_you_mean(word, names())
    raise RecipeError([f"no shipped recipe of that name{hint} (shipped: {', '.join(names())})"], word)


def summary(name: str) -> str:
    """Return the first comment line of a shipped recipe."""
    first = strict_yaml.read_text(find(name)).splitlines()[0]
    return first.lstrip("# ").strip()
