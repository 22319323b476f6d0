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


# What tells a file from the name of a shipped recipe.
ENDINGS = (".yaml", ".yml")
# The sub-folder of suites, which are recipes on several sets of images; see ``remap.recipe.suite``.
SUITES = "compare"


def names() -> list[str]:
    """Return the names of all shipped recipes, with their sub-folder; suites are not among them."""
    return [name for name in _all_names() if not name.startswith(f"{SUITES}/")]


def suites() -> list[str]:
    """Return the names of all shipped suites, with their sub-folder."""
    return [name for name in _all_names() if name.startswith(f"{SUITES}/")]


def _all_names() -> list[str]:
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find(word: str, *, suite: bool = False) -> Path:
    """Return the path of a recipe, or of a suite: a file if the word ends in .yaml, else a shipped name.

    Raises:
        RecipeError: Neither exists, or it is not a readable file.
    """
    if word.endswith(ENDINGS):
        path = expanded(word)
        try:
            open_regular(path).close()
        except OSError as error:
            missing = error.errno == errno.ENOENT and not os.path.islink(path)
            raise RecipeError(["no such file" if missing else f"cannot be read: {error.strerror}"], word) from None
        return path
    shipped, what = (suites(), "suite") if suite else (names(), "recipe")
    if suite and f"{SUITES}/{word}" in shipped:
        word = f"{SUITES}/{word}"
    if word in shipped:
        return folder() / f"{word}.yaml"
    raise RecipeError(
        [f"no shipped {what} of that name{did_you_mean(word, shipped)} (shipped: {', '.join(shipped)})"],
        word,
        do="take one of these, or name a file that ends in .yaml",
    )


def require_findable(path: Path) -> None:
    """Refuse to write a recipe under a name that ``find`` would take for a shipped one.

    Raises:
        RecipeError: It does not end in .yaml or .yml.
    """
    if not path.name.endswith(ENDINGS):
        raise RecipeError(["a recipe's file ends in .yaml: any other word is the name of a shipped one"], str(path))


def summary(name: str) -> str:
    """Return the first comment line of a shipped recipe."""
    first = strict_yaml.read_text(find(name)).splitlines()[0]
    return first.lstrip("# ").strip()
