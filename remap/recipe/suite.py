"""A suite: one recipe on several sets of images, with the counts that each set must have. Imports no torch."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import Field

from remap.data.words import below
from remap.errors import RecipeError
from remap.recipe import catalogue, overrides, strict_yaml, validate
from remap.recipe.problems import checked
from remap.recipe.schema import Recipe, Section

_ANY = Path("/")
_PATHS = ("source", "val_source", "unlabeled", "target")


class SuiteSet(Section):
    """One set of images and what it has to hold."""

    data: dict[str, Any] = Field(description="The section data of its recipe; paths are relative to --sets.")
    train: int | None = Field(default=None, ge=1, description="Training images there must be; null is any number.")
    val: int | None = Field(default=None, ge=1, description="Evaluation images there must be; null is any number.")
    classes: int | None = Field(default=None, ge=2, description="Classes there must be; null is any number.")
    class_ids: bool = Field(default=False, description="Class names must be the whole numbers from 0.")
    recipe: dict[str, Any] = Field(default={}, description="Sections in place of those of the suite's recipe.")
    group: str | None = Field(default=None, description="Group whose mean is shown besides that of all sets.")


class Suite(Section):
    """What `remap compare --suite` runs: a comparison of the same methods and recipe on each set."""

    recipe: dict[str, Any] = Field(default={}, description="A recipe without data.")
    methods: str | None = Field(default=None, description="As --methods.")
    seeds: int = Field(default=3, ge=1, description="As --seeds.")
    budget: str | None = Field(default=None, description="As --budget.")
    search: int | str | None = Field(default=None, description="As --search.")
    sets: dict[str, SuiteSet] = Field(min_length=1, description="Sets of images by name.")

    def recipe_of(
        self, name: str, folder: Path | None, words: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
    ) -> Recipe:
        """Return the recipe of a set, whose images lie below ``folder``.

        Args:
            words, settings: Options of the command line, as ``resolve`` takes them.

        Raises:
            RecipeError: It cannot be used, or there is no folder.
        """
        data, problems = dict(self.sets[name].data), list[str]()
        for key in _PATHS:
            if key in data and below(folder or _ANY, data[key]) != data[key]:
                if folder is None:
                    do = "name the folder that the sets are in: --sets DIR"
                    raise RecipeError([f"sets.{name}: its images are not built in"], "suite", do=do)
                data[key] = below(folder, data[key])
        values = deepcopy({**self.recipe, **self.sets[name].recipe, "name": name})
        if not isinstance(own := values.get("data", {}), dict):
            raise RecipeError(["data: should be a mapping, as each set has its own images"], f"suite, set {name}")
        values["data"] = {**own, **data}
        given = [*overrides.of_words(words or {}, values, problems), *overrides.of_settings(settings, problems)]
        problems += [
            f"{key}: each set of a suite has its own images"
            for key, _ in given
            if key == "data" or key.removeprefix("data.") in _PATHS
        ]
        for key, value in given:
            overrides.apply(values, key, value, problems)
        if problems:
            raise RecipeError(problems, f"suite, set {name}")
        return validate(values, f"suite, set {name}")


def load_suite(word: str) -> Suite:
    """Return a shipped suite or that of a YAML file.

    Raises:
        RecipeError: There is none, or it is not a suite.
    """
    path = catalogue.find(word, suite=True)
    found = checked(Suite, strict_yaml.read_mapping(path), str(path))
    for name in found.sets:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise RecipeError([f"sets.{name}: not a name of a folder (letters, digits, - and _)"], str(path))
    return found
