"""Labels only: the run's student without a teacher, trained for as many steps, to compare with."""

from collections.abc import Mapping
from typing import Any

from remap.pipeline.components import RunComponents
from remap.pipeline.labels_only import labels_only, of_same_steps
from remap.progress import Progress
from remap.recipe.schema import Recipe


def baseline_recipe(components: RunComponents, progress: Progress) -> Recipe | None:
    """Return the recipe of the run's baseline: labels only, the same augmentation and number of steps.

    None where the recipe wants none, or where there is nothing to compare with, which is said.
    """
    recipe, labeled = components.recipe, len(components.views.train.split)
    if not recipe.baseline:
        return None
    if (why := why_none(components)) is not None:
        progress.say(f"the student is not trained on labels alone, to compare with: {why}")
        return None
    # Fewer images where some have no label, so more epochs for the same number of steps.
    alone = of_same_steps(labels_only(recipe), len(components.training_source.split), labeled)
    # Where no epoch is chosen, figures between serve the eye alone: it is evaluated at its end.
    eval_every = alone.train.eval_every if alone.train.selects else alone.train.epochs
    train = alone.train.model_copy(update={"eval_every": eval_every, "track": ()})
    # A name has at most 64 characters (``Recipe.name``), nine of which are the suffix.
    return alone.model_copy(update={"name": f"{recipe.name[:55]}-baseline", "train": train})


def why_none(components: RunComponents) -> str | None:
    """Return why there is nothing to compare a run with; None where there is."""
    if not len(components.views.train.split):
        return "there are no labelled images"
    return "the student is cut from its teacher" if components.recipe.student.shrink is not None else None


def baseline_figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the summary of a run says of its baseline, from the baseline's own."""
    names = ("accuracy", "interval", "correct", "test_accuracy")
    # There is a test accuracy only where the data has test images.
    figures = {name: summary["student"][name] for name in names if name in summary["student"]}
    return {**figures, **{name: summary[name] for name in ("losses", "epochs", "seconds")}}
