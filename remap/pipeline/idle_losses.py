"""The default objective for the two models at hand."""

import os

from remap.io import atomic_write
from remap.io.checked_read import expanded
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import ModelSpec, Recipe
from remap.remapping import LOSSES


def without_idle_losses(recipe: Recipe, progress: Progress) -> Recipe:
    """Leave attention out of the default objective where one of the models has none over the whole image, and say so.

    Losses that somebody chose stay as they are, and an impossible one is an error when it is built. Every command
    calls this before it makes a run directory, so that recipe.yaml lists the losses of the run. The family is read
    from the model's name: the recipe is settled before anything is built, and a model that the name does not tell
    keeps the default.
    """
    chosen = [loss for loss in recipe.losses if LOSSES.row(loss.name).category != "attention"]
    if not recipe.has_default_losses or recipe.teacher is None or len(chosen) == len(recipe.losses):
        return recipe
    specs = [("student", recipe.student), *(("teacher", spec) for spec in recipe.teachers if not spec.is_student)]
    without = [f"the {role} {spec.model}" for role, spec in specs if _lacks_attention(spec)]
    if not without:
        return recipe
    have = "has" if len(without) == 1 else "have"
    progress.say(f"the attention loss is left out: {' and '.join(without)} {have} no attention over the whole image")
    return recipe.model_copy(update={"losses": tuple(chosen)})


def _lacks_attention(spec: ModelSpec) -> bool:
    from remap.backbones.by_name import family_of_name  # timm
    from remap.backbones.families import FAMILIES

    family = family_of_name(_backbone_of(spec.model))
    return family is not None and "sequence" not in FAMILIES.row(family).parts


def _backbone_of(word: str) -> str:
    """The model behind a run directory; other words stay as they are."""
    if not is_run(word):
        return word
    path = expanded(word)
    task = path / "task" / "task.json"
    values = atomic_write.read_json(task if os.path.isfile(task) else path / "task.json")
    source = values.get("backbone") if isinstance(values, dict) else None
    return str(source.get("model", "")) if isinstance(source, dict) else ""
