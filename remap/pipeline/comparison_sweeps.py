"""What a comparison varies besides its methods: swept options and recipe fields, and loss sets."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remap.errors import RecipeError
from remap.recipe import overrides, strict_yaml, validate
from remap.recipe.named import loss_words
from remap.recipe.option_listing import listed, surely_valid
from remap.recipe.problems import checked
from remap.recipe.resolution import chooses_losses
from remap.recipe.schema import LossSpec, MethodSpec, Recipe
from remap.registry import did_you_mean
from remap.remapping import LOSSES
from remap.tuning import METHODS, config_of, parts_of

# Fields whose values become cells by options of their own.
_NOT_SWEPT = {"seed": "--seeds", "method": "--methods", "method.name": "--methods", "losses": "--loss-set"}
# Swept keys and one value of each.
Settings = tuple[tuple[str, Any], ...]


def read_sweep(text: str) -> tuple[str, list[Any]]:
    """Read "method.num_prompts=5,10" as a key and its values.

    Raises:
        RecipeError: It is written otherwise, or has an option of its own.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    if not equals or not key or not values.strip():
        raise RecipeError([f"--sweep {text}: write KEY=VALUE,VALUE"], "command line")
    if key in _NOT_SWEPT:
        raise RecipeError([f"--sweep {text}: it has an option of its own, {_NOT_SWEPT[key]}"], "command line")
    # Read as a list of YAML, so that values have the types that they have in a recipe.
    found = strict_yaml.parse(f"[{values}]", f"--sweep {text}")
    # As JSON: to Python 1, 1.0 and true are equal, and a list has no hash.
    if len({json.dumps(value) for value in found}) < len(found):
        raise RecipeError([f"--sweep {text}: a value is given twice"], "command line")
    return key, found


def read_sweeps(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Read several sweeps as keys and their values.

    Raises:
        RecipeError: One cannot be read, or two are of the same key.
    """
    found: dict[str, list[Any]] = {}
    for key, values in map(read_sweep, texts):
        if key in found:
            raise RecipeError([f"--sweep {key}: it is given twice (write all values in one)"], "command line")
        found[key] = values
    return found


def products(grid: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Return every combination of the values; the one without any for an empty grid."""
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with swept fields set, checked.

    Raises:
        RecipeError: A field or value is not one of a recipe.
    """
    if not settings:
        return recipe
    values, problems = recipe.model_dump(mode="json"), list[str]()
    by_default = recipe.has_default_losses and not any(chooses_losses(key) for key, _ in settings)
    if by_default:
        del values["losses"]  # what they are may follow from what is swept
    for key, value in settings:
        overrides.apply(values, key, value, problems)
    where = f"--sweep {' '.join(map(shown_setting, settings))}"
    if problems:
        raise RecipeError(problems, where)
    found = validate(values, where)
    if by_default:
        found.model_fields_set.discard("losses")  # written out where an option of theirs is swept, and still not chosen
    return found


def loss_set(recipe: Recipe, words: str) -> tuple[LossSpec, ...]:
    """Return the losses that words name, checked with the recipe; those that it has keep their options.

    Raises:
        RecipeError: They cannot be used.
    """
    try:
        chosen = [dict(one) if isinstance(one, dict) else {"name": one} for one in loss_words(words)]
    except ValueError as error:
        raise RecipeError([f"--loss-set {words}: {error}"], "command line") from None
    own = {loss.name: loss.model_dump(mode="json") for loss in recipe.losses}  # with their temperature and the like
    values = recipe.model_dump(mode="json") | {"losses": [{**own.get(one["name"], {}), **one} for one in chosen]}
    # Idle ones are left out for each method; a method that is free to change everything hides none. A joint teacher
    # goes with slad alone, which is.
    if not any(spec.joint for spec in recipe.teachers):
        values["method"] = {"name": "full"}
    return validate(values, f"--loss-set {words}").losses


def words_of(losses: Sequence[LossSpec]) -> str:
    """Return the words of losses, with the weights that are not their defaults: "ce,kd:0.5"."""
    return ",".join(
        one.name + ("" if one.weight == LOSSES.row(one.name).weight else f":{one.weight:g}") for one in losses
    )


def options_of(method: str) -> set[str]:
    """Return the names of a method's own options; a combination has none, since they are those of its methods."""
    return {row["name"] for row in listed(METHODS, method)["options"]} if len(parts_of(method)) == 1 else set()


def require_owners(options: Mapping[str, Any], methods: Sequence[str]) -> None:
    """Refuse swept options that no method has.

    Raises:
        RecipeError: Which ones.
    """
    of_all = set().union(*(options_of(word.partition("@")[0]) for word in methods)) if options else set()
    missing = [
        f"--sweep method.{name}: none of {', '.join(methods)} has it{did_you_mean(name, of_all)}"
        for name in options
        if name not in of_all
    ]
    if missing:
        raise RecipeError(missing, "command line")


def require_options(spec: MethodSpec) -> None:
    """Check the options of a method.

    Raises:
        RecipeError: It does not take them.
    """
    sure = "+" not in spec.name and surely_valid(METHODS, spec.name, spec.options)
    if spec.options and not sure:  # the class tells, which imports torch
        checked(config_of(spec.name), spec.options, f"method {spec.name}")


def shown_setting(setting: tuple[str, Any]) -> str:
    """Return "num_prompts=5" for an option of a method, and "train.epochs=5" for a field of the recipe."""
    key, value = setting
    return f"{key.removeprefix('method.')}={_shown(value)}"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Return the short spelling of a number, unless another number has it too."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
