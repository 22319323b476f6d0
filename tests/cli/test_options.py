"""The table of training options: every row reaches the recipe, in the field that ``WORDS`` names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from remap.errors import RemapError
from remap.pipeline import build_cache, compare, objective
from remap.pipeline.session_protocol import DEFAULT_WAYS
from remap.recipe import Recipe, resolve, resolve_distill
from remap.recipe.resolution import WORDS
from remap_cli.options import BUILD, COMPARE, DISTILL, OPTIONS, RECIPE_OPTIONS, TUNE, OptionRow, recipe_words

# Values other than the defaults; of strings that are names, one that exists.
NUMBERS = {int: "7", float: "0.5"}
NAMES = {
    "track": "wandb,mlflow", "method": "bitfit", "losses": "ce,feature", "init": "layers", "weights": "none",
    "classes": "a,b", "student": "clip:other",
}  # fmt: skip
FIELDS = {**WORDS, "weights": "student.weights"}


class Seen(RemapError):
    """Ends a command as soon as it has its recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__("seen")
        self.recipe = recipe


@pytest.fixture
def recipe_of(remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Recipe]:
    """The recipe that a command makes of its options."""
    (tmp_path / "other").mkdir()  # a path where nothing is would be refused

    def see(recipe: Recipe, *_: Any) -> None:
        raise Seen(recipe)

    # All imported above: a module that is imported while a name is patched would keep the patch for later tests.
    functions = ((objective, "without_idle_losses"), (compare, "compare"), (build_cache, "build_cache"))
    for module, name in functions:
        monkeypatch.setattr(module, name, see)

    def call(*words: str) -> Recipe:
        result = remap(*words)
        assert isinstance(result.exception, Seen), getattr(result, "message", result.output)
        return result.exception.recipe

    return call


def sample(row: OptionRow, command: str) -> str | None:
    """A value for an option; None for a flag."""
    if row.name == "losses" and command == TUNE:
        return "ce,mmd"  # most others need a teacher
    if "bool" in str(row.parameter.annotation):
        return None
    return NAMES.get(row.name, "other") if row.kind is str else NUMBERS.get(row.kind, "7")


def in_words(recipe: Recipe, field: str) -> str:
    """A field as the command line would say it."""
    value: Any = recipe
    for name in field.split("."):
        value = getattr(value, name)
    if isinstance(value, (list, tuple)):
        return ",".join(getattr(one, "name", one) for one in value)
    return str(getattr(value, "name", value))


@pytest.mark.parametrize("command", [DISTILL, TUNE, BUILD, COMPARE])
def test_every_option_of_a_command_reaches_the_recipe(recipe_of: Callable[..., Recipe], command: str) -> None:
    rows = [row for row in RECIPE_OPTIONS if command in row.commands]
    if command == DISTILL:  # which has images without labels of one domain, or of two
        rows = [row for row in rows if row.name != "target"]
    words = [word for row in rows for word in (row.option, sample(row, command)) if word is not None]
    recipe = recipe_of(*command.split(), *words, "--set", "train.warmup_epochs=0.25")
    for row in rows:
        given = sample(row, command)
        assert in_words(recipe, FIELDS[row.word or row.name]) == ("True" if given is None else given), row.name
    assert recipe.train.warmup_epochs == 0.25


def test_every_field_of_the_command_line_has_an_option() -> None:
    assert {row.word or row.name for row in RECIPE_OPTIONS} == set(FIELDS)


def test_a_flag_that_is_off_is_not_given() -> None:
    """Otherwise it would overrule a recipe that turns it on."""
    values = {row.name: row.parameter.default for row in OPTIONS if DISTILL in row.commands}
    assert set(recipe_words(values).values()) == {None}


def test_the_help_shows_the_defaults_of_the_recipes() -> None:
    shown = {row.name: row.shown for row in RECIPE_OPTIONS if DISTILL in row.commands}
    recipe, digits = resolve_distill(None, {"data": "photos"}), resolve_distill(None)
    for one in (recipe, digits):
        assert (one.teacher.model, one.student.model) == (shown["teacher"], shown["student"])
        assert one.student.weights == shown["weights"]
        assert ",".join(loss.name for loss in one.losses) == str(shown["losses"]).partition(", ")[0]
        assert str(one.seed) == shown["seed"]
    assert digits.data.source == shown["data"]
    assert shown["method"] == f"{recipe.method.name}; digits {digits.method.name}"
    for name in ("epochs", "batch_size"):
        assert shown[name] == f"{getattr(recipe.train, name)}; digits {getattr(digits.train, name)}"
    alone = {row.name: row.shown for row in RECIPE_OPTIONS if TUNE in row.commands}
    tuned = resolve(None, {})  # which does not begin with the recipe of the digits
    found = (tuned.student.model, tuned.method.name, str(tuned.train.epochs), str(tuned.train.batch_size))
    assert tuple(alone[name] for name in ("student", "method", "epochs", "batch_size")) == found


def test_the_help_says_that_the_method_decides_about_the_default_losses() -> None:
    """`linear` does not train attention, and is not made to follow it."""
    (row,) = (row for row in RECIPE_OPTIONS if row.name == "losses" and DISTILL in row.commands)
    usual = str(row.shown).partition(", ")[0]
    assert ",".join(loss.name for loss in resolve_distill(None, {"method": "linear"}).losses) != usual
    assert "of these what the method can follow" in str(row.shown)


def test_the_help_of_tune_shows_losses_without_a_teacher() -> None:
    (row,) = (row for row in RECIPE_OPTIONS if row.name == "losses" and TUNE in row.commands)
    alone, moved = (resolve(None, words).losses for words in ({}, {"target": "photos"}))
    names = [",".join(loss.name for loss in losses) for losses in (alone, moved)]
    assert row.shown == "{}; with --target {}".format(*names) and "kd" not in row.help


def test_the_help_shows_the_default_ways() -> None:
    (shown,) = [row.shown for row in OPTIONS if row.name == "ways"]
    assert shown == ",".join(DEFAULT_WAYS)
