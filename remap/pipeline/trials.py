"""``losses: auto``: a few objectives are tried on held-out training images for few steps, and the best one is taken."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from remap.pipeline.labels_only import images_of, labels_only, of_same_steps
from remap.pipeline.shared import SharedResources
from remap.recipe.schema import LossSpec, Recipe
from remap.remapping import LOSSES
from remap.runs.run_dir import RunDir

# Share of the labelled training images that a trial is judged by, and of the run's epochs that it takes.
HELD_OUT, EPOCHS = 0.2, 0.25
TEMPERATURES = (1.0, 2.0, 4.0)


def objectives(recipe: Recipe) -> dict[str, tuple[LossSpec, ...] | None]:
    """Return the objectives that are tried, by the name of their folder; None is labels alone.

    Of equal ones the first is taken, so labels alone come first.
    """
    named = {loss.name: loss for loss in recipe.losses}  # those of the default
    ce = named.get("ce", LossSpec(name="ce"))
    kd = {one: LossSpec.model_validate({"name": "kd", "temperature": one}) for one in TEMPERATURES}
    # A student that is cut from its teacher cannot be without it.
    found: dict[str, tuple[LossSpec, ...] | None] = {} if recipe.student.shrink is not None else {"labels": None}
    found |= {f"labels-kd{one:g}": (ce, kd[one]) for one in TEMPERATURES}
    if all(spec.overtaken == "keep" for spec in recipe.teachers):  # a teacher that fades needs a loss on labels
        found["kd1"] = (kd[1.0],)
    if {"kd", "attention"} <= named.keys():  # where method and models allow
        temperature = LOSSES.load("kd").Config(**named["kd"].options).temperature
        found[f"labels-kd{temperature:g}-attention"] = (ce, named["kd"], named["attention"])
    return found


def trials(recipe: Recipe, shared: SharedResources) -> Iterator[tuple[str, Recipe]]:
    """Yield name and recipe of each trial: the run itself on fewer images, for a quarter of its epochs."""
    epochs, warmup = max(1, ceil(EPOCHS * recipe.train.epochs)), recipe.train.warmup_epochs
    # All trials train for as long, and are judged after their last epoch.
    train = recipe.train.model_copy(
        update={
            **{"keep": "last", "metric": "accuracy", "patience": None},
            "epochs": epochs,
            "warmup_epochs": None if warmup is None else EPOCHS * warmup,
            "eval_every": recipe.train.epochs,  # the last epoch is always evaluated
            "track": (),
        }
    )
    held_out = recipe.data.model_copy(update={"held_out": HELD_OUT, "selection": None})
    # On a few held-out images no teacher is clearly above chance; the run itself asks on all evaluation images.
    teachers = tuple(spec.model_copy(update={"allow_weak": True}) for spec in recipe.teachers)
    update = {"data": held_out, "train": train, "teachers": teachers, "baseline": False, "choose_losses": False}
    short = recipe.model_copy(update=update)
    counts = images_of(short, shared)
    for name, losses in objectives(recipe).items():
        trial = _with(short, losses, *counts)
        yield name, trial.model_copy(update={"name": f"trial-{name}"})


def chosen(recipe: Recipe, accuracies: Mapping[str, float], shared: SharedResources) -> Recipe:
    """Return the run's recipe with the objective that was best on the held-out images."""
    best = max(accuracies, key=lambda name: accuracies[name])  # of equal ones the first
    found = _with(recipe, objectives(recipe)[best], *images_of(recipe, shared))
    return found.model_copy(update={"choose_losses": False})


def tried(run_dir: RunDir) -> dict[str, Any]:
    """Return the held-out accuracy of each trial of a run, for its summary; nothing where there were none."""
    trials = {path.name: RunDir(path).summary() for path in sorted(run_dir.trials.glob("*"))}
    return {"trials": {name: one["student"]["accuracy"] for name, one in trials.items()}} if trials else {}


def _with(recipe: Recipe, losses: tuple[LossSpec, ...] | None, labeled: int, images: int) -> Recipe:
    """Return the recipe with an objective; by labels alone it is without a teacher and has as many steps."""
    if losses is not None:
        return recipe.model_copy(update={"losses": losses})
    return of_same_steps(labels_only(recipe), images, labeled)
