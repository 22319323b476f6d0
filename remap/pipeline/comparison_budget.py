"""The budget of a comparison, the same for every cell: epochs, minutes of training, or trained parameters."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from remap.errors import RecipeError, RemapError, RunError
from remap.io import atomic_write
from remap.io.checked_json import read_run_json
from remap.pipeline.comparison_cells import Cell
from remap.progress import Progress, Silent
from remap.recipe import validate
from remap.recipe.schema import Recipe
from remap.tuning import config_of, parts_of

if TYPE_CHECKING:
    from remap.backbones.build import Backbone

KINDS = {"epochs": int, "minutes": float, "parameters": int}
# Measured epochs of cells, in the folder of the comparison, so that it is resumed with the same ones.
RECORD = "budget.json"
# The option that decides how much a method trains, the first that it has.
SIZES = (
    "numbers",
    "vectors",
    "num_prompts",
    "bottleneck",
    "rank",
    "coefficients",
    "border",
    "num_weights",
    "num_blocks",
)
# Values of an option are looked for below this one.
_MOST = 2**14


def read_budget(text: str | None) -> tuple[str, float] | None:
    """Read "epochs=12", "minutes=10" or "parameters=50000".

    Raises:
        RecipeError: It is none of these.
    """
    if text is None:
        return None
    kind, _, value = text.partition("=")
    try:
        found = KINDS[kind.strip()](value)
        if not (math.isfinite(found) and found > 0):  # float() reads "inf" and "nan" too
            raise ValueError(value)
    except (KeyError, ValueError):
        allowed = "epochs=12, minutes=10 or parameters=50000"
        raise RecipeError([f"--budget {text}: not a budget (allowed: {allowed})"], "command line") from None
    return kind.strip(), found


def require_no_epochs(given: Mapping[str, bool | Iterable[str]], budget: str | None, do: str | None = None) -> None:
    """Refuse epochs beside a budget that decides them, which would ignore them.

    Args:
        given: What would set the epochs, by its name: whether it does, or the settings (``KEY=VALUE``) to look at.
        budget: As ``read_budget`` reads it.
        do: What the message advises; None is to leave one of the two out.

    Raises:
        RecipeError: Names both.
    """
    kind = (budget or "").partition("=")[0].strip()
    if kind not in ("epochs", "minutes"):
        return
    for name, how in given.items():
        keys = ("train.epochs",) if how is True else (one.partition("=")[0].strip() for one in how or ())
        if "train.epochs" in keys:
            problem = f"{name}: the epochs follow from the budget {budget}"
            raise RecipeError([problem], "command line", do=do or "leave out the one that you do not mean")


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe with other epochs, checked."""
    values = recipe.model_dump(mode="json")
    return validate(values | {"train": {**values["train"], "epochs": epochs}}, f"--budget epochs={epochs}")


def within_minutes(cells: Sequence[Cell], minutes: float, output: Path, progress: Progress) -> list[Cell]:
    """Return the cells with as many epochs as fit into ``minutes`` of training each, measured once on this machine.

    Raises:
        RunError: What was measured was for another budget, or is damaged.
    """
    path = output / RECORD
    known: dict[str, Any] = read_run_json(path) if path.is_file() else {"minutes": minutes, "epochs": {}}
    if known.get("minutes") != minutes or not isinstance(known.get("epochs"), dict):
        do = "name another --output, or repeat --budget as it was"
        raise RunError(f"{path} is of another budget", given=f"minutes={minutes:g}", do=do)
    found: list[Cell] = []
    for cell in cells:
        # By group: all seeds of a cell get the epochs that the first one was measured for.
        if cell.group not in known["epochs"]:
            # Imported here, since a resumed comparison has its measurements and needs no torch.
            from remap.pipeline.dry_run import estimate

            with progress.wait(f"timing a step of {cell.group}"):
                one = estimate(cell.recipe, Silent())["estimate"]
            epoch = one["step_seconds"] * one["steps"] / cell.recipe.train.epochs
            known["epochs"][cell.group] = max(1, int(60 * minutes / epoch))
            # After each measurement: a resumed comparison must not time a cell again, to other epochs.
            atomic_write.write_json(path, known)
        found.append(replace(cell, recipe=of_length(cell.recipe, int(known["epochs"][cell.group]))))
    return found


def of_length(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe with other epochs, and warm-ups and patience of the same share of them."""
    train, share = recipe.train, epochs / recipe.train.epochs
    warmup = None if train.warmup_epochs is None else train.warmup_epochs * share
    patience = None if train.patience is None else max(1, round(train.patience * share))
    update = {"epochs": epochs, "warmup_epochs": warmup, "patience": patience}
    losses = tuple(loss.over(share) for loss in recipe.losses)
    return recipe.model_copy(update={"train": train.model_copy(update=update), "losses": losses})


def within_parameters(cells: Sequence[Cell], most: int, classes: int) -> tuple[list[Cell], dict[str, str]]:
    """Return the cells whose students train at most ``most`` parameters, classifier included, and why others do not.

    The option in ``SIZES`` that a method has takes the largest value that stays within; what it trains is counted on
    the method itself, attached to the student.
    """
    from remap.runs.task import open_backbone

    students: dict[str, Any] = {}
    sizes: dict[str, dict[str, int] | str] = {}
    for cell in cells:
        if cell.label not in sizes:
            spec = cell.recipe.student
            # What weights a student starts from changes no count: one backbone serves all of one architecture.
            key = repr(spec.model_copy(update={"init": None, "force_init": False}))
            students[key] = students.get(key) or open_backbone(spec, classes)
            sizes[cell.label] = _size_within(cell, most, students[key])
    kept = []
    for cell in cells:
        size = sizes[cell.label]
        if not isinstance(size, str):
            method = cell.recipe.method.model_copy(update=size)
            kept.append(replace(cell, recipe=cell.recipe.model_copy(update={"method": method})))
    if not kept:
        problems = [f"--budget parameters={most}: {why}" for why in sizes.values()]
        raise RecipeError(problems, "command line", do="name a larger budget")
    return kept, {label: size for label, size in sizes.items() if isinstance(size, str)}


def _size_within(cell: Cell, most: int, student: "Backbone") -> dict[str, int] | str:
    """Return the option to set, nothing where there is none to set, or why no value stays within."""
    spec, swept = cell.recipe.method, dict(cell.settings)
    config = config_of(spec.name)
    fields = config.model_fields if len(parts_of(spec.name)) == 1 else {}
    option = next((name for name in SIZES if name in fields and f"method.{name}" not in swept), None)
    if option is None:
        count = trained_parameters(student, spec.name, spec.options)
        if count is None:
            return f"{cell.label} does not fit {cell.recipe.student.model}"
        return {} if count <= most else f"{cell.label} trains {count:,} parameters"

    def valid(value: int) -> int:
        """Return the largest value up to this one that the method takes: ranks may have to be even."""
        while value:
            try:
                config(**{**spec.options, option: value})
                return value
            except ValidationError:
                value -= 1
        return 0

    def fits(value: int) -> bool:
        taken = valid(value)
        count = trained_parameters(student, spec.name, {**spec.options, option: taken}) if taken else None
        return count is not None and count <= most

    # Not 1 alone, which a method may refuse: ranks may have to be even.
    low = next((value for value in (1, 2, 4, 8, 16) if fits(value)), 0)
    if not low:
        return f"{cell.label} trains more parameters with any {option}"
    # Doubled, then halved between: each count copies the student and attaches the method.
    high = 2 * low
    while high < _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {option: valid(low)}


def trained_parameters(student: "Backbone", method: str, options: dict[str, Any]) -> int | None:
    """Return how many parameters a method trains, classifier included; None where it cannot be attached."""
    from remap.network import tuned

    try:
        return tuned(deepcopy(student), method, options).num_trainable  # attaching changes the model
    except (RemapError, ValueError):  # ValueError: options that the method refuses
        return None
