"""Labels only: the run's student without a teacher, trained for as many steps, to compare with."""

from math import ceil
from typing import Any

from remap.pipeline.comparison_cells import labels_only
from remap.pipeline.components import RunComponents
from remap.progress import Progress
from remap.recipe.schema import Recipe


def baseline_recipe(components: RunComponents, progress: Progress) -> Recipe | None:
    """Return the recipe of the run's baseline: labels only, the same augmentation and number of steps.

    None where the recipe wants none, or where there is nothing to compare with, which is said.
    """
    recipe, labeled = components.recipe, len(components.views.train.split)
    if not recipe.baseline:
        return None
    if not labeled or recipe.student.shrink is not None:
        why = "the student is cut from its teacher" if labeled else "there are no labelled images"
        progress.say(f"no training on labels alone to compare with: {why}")
        return None
    train, batch = recipe.train, recipe.train.batch_size
    # Fewer images make shorter epochs: the baseline takes more of them for the same number of steps.
    longer = max(1, len(components.training_source.split) // batch) / max(1, labeled // batch)
    epochs, warmup = ceil(train.epochs * longer), train.warmup_epochs
    update = {
        "epochs": epochs,
        "warmup_epochs": None if warmup is None else warmup * longer,
        "eval_every": epochs,
    }
    alone = labels_only(recipe)
    return alone.model_copy(update={"name": f"{recipe.name[:55]}-baseline", "train": train.model_copy(update=update)})


def baseline_figures(summary: dict[str, Any]) -> dict[str, Any]:
    """Return what the summary of a run says of its baseline, from the baseline's own."""
    names = ("accuracy", "correct", "test_accuracy")
    figures = {name: summary["student"][name] for name in names if name in summary["student"]}
    return {**figures, **{name: summary[name] for name in ("losses", "epochs", "seconds")}}
