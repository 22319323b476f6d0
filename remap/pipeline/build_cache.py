"""Compute and store teacher outputs before any training: ``remap cache build``."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from remap.distributed.interrupts import watch_signals
from remap.distributed.launch import accelerator, broadcast_str, check_processes
from remap.errors import RecipeError
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.disk_outputs import store_on_disk
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.run import run, validate_inputs
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import choose_storage, make_teacher
from remap.pipeline.teacher_tuning import needs_logits, teachers_to_tune
from remap.pipeline.weak_teachers import check_teachers
from remap.progress import Progress, Silent
from remap.recipe import Recipe
from remap.recipe.schema import EMA
from remap.recipe.teacher_checks import what_changes
from remap.runs.run_dir import RunDir


def build_cache(recipe: Recipe, progress: Progress = Silent()) -> list[dict[str, Any]]:
    """Prepare a recipe's teachers as a run would, and store their outputs on disk, where a run finds them.

    Says what they take before they are computed: images, views, bytes, time. A build that was stopped continues.

    Returns:
        One entry per teacher: teacher, key, folder, items, images (rows, one for each view), views, computed, bytes,
        seconds. With ``teacher.folds``
        one for each fold, and one (fold 0) for images without labels, where there are any.
    """
    check_processes(recipe.train.processes)
    shared = SharedResources()
    # Nothing is tracked, so trackers need not be installed.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"track": ()})})
    validate_inputs(recipe, shared)
    _require_cacheable(recipe)
    # As ``start`` does it, or the run would ask for other outputs.
    recipe = without_idle_losses(recipe, progress).written_out()
    with watch_signals(), prepared_components(recipe, progress, shared) as components:
        components.recipe = _with_all_views(recipe)
        return store_outputs(components, progress)


def _with_all_views(recipe: Recipe) -> Recipe:
    """Return the recipe with epochs enough for all its views: runs of more epochs look for them too."""
    epochs = max(recipe.train.epochs, recipe.data.finite_views)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs})})


@contextmanager
def prepared_components(recipe: Recipe, progress: Progress, shared: SharedResources) -> Iterator[RunComponents]:
    """Prepare a recipe's teachers as a run would, and refuse weak ones; what is not shared goes when the block ends."""
    # In a temporary run directory of the main process.
    with TemporaryDirectory(prefix="remap-cache-") as folder:
        path = Path(broadcast_str(folder)) / "run"
        run_dir = RunDir.create(path, recipe) if accelerator().is_main_process else RunDir(path)
        accelerator().wait_for_everyone()
        for teacher in teachers_to_tune(recipe, run_dir, progress, shared):
            heard_by, shares = teacher.heard_by(progress), teacher.shares(shared)
            run(teacher.recipe, teacher.run_dir, heard_by, shares, resuming=True)
        components = build_components(recipe, run_dir, progress, shared)
        check_teachers(components, progress)
        yield components
        accelerator().wait_for_everyone()  # the folder is removed with the main process


def prepare_shared_teacher(recipes: Iterable[Recipe], progress: Progress, shared: SharedResources) -> None:
    """Prepare the teachers that several runs share, before the first of them and so under no run's name.

    Args:
        recipes: Of the runs; the first whose losses need a prepared teacher stands for all.
    """
    for recipe in recipes:
        if needs_logits(recipe) and not all(spec.is_student for spec in recipe.teachers):
            with watch_signals(), prepared_components(recipe.written_out(), progress, shared):
                return


def store_outputs(components: RunComponents, progress: Progress) -> list[dict[str, Any]]:
    """Store the outputs of every teacher of a run on disk, without training.

    Raises:
        DataError: A teacher's outputs cannot be cached.
    """
    stored = []
    for number, prepared in enumerate(components.teachers):
        if prepared.spec.model == EMA or not components.objective.reads_teacher(number):
            continue  # a running average changes in training
        # The command says disk, whatever the recipe prefers for training.
        prepared.spec = prepared.spec.model_copy(update={"cache": "disk"})
        teacher = make_teacher(components, number)
        try:
            storage = choose_storage(components, prepared, teacher)
            reports = store_on_disk(components, teacher, prepared, storage.shapes, progress, timed=True)
            stored += [{"teacher": prepared.spec.model, **report} for report in reports]
        finally:
            teacher.close()
    return stored


def _require_cacheable(recipe: Recipe) -> None:
    for spec in recipe.teachers:
        changing = what_changes(spec, recipe.data)
        if spec.model == EMA and len(recipe.teachers) > 1:
            continue  # the outputs of the others are stored
        if spec.cache == "off":
            line = f"teacher {spec.model}: teacher.cache=off caches nothing, and a run with it reads nothing"
            raise RecipeError([f"{line} (leave it out)"], "cache build")
        if changing is not None:
            raise RecipeError([f"teacher {spec.model}: nothing can be cached, since {changing}"], "cache build")
