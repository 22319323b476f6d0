"""The commands of training and evaluation as Python functions, besides ``remap.distill``."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from remap.engine.callback import Callback
from remap.errors import RecipeError
from remap.io.paths import expanded
from remap.pipeline import compare as comparison
from remap.pipeline.comparison_budget import require_no_epochs
from remap.pipeline.comparison_cells import DEFAULT_SEEDS, chosen_methods
from remap.pipeline.comparison_plan import RANKED, Plan
from remap.pipeline.evaluate_run import evaluate_run
from remap.pipeline.recommend import recommend as rank
from remap.pipeline.run import Result, as_recipe, start
from remap.pipeline.shrink_student import cut
from remap.progress import Progress, Silent
from remap.recipe import Recipe, resolve
from remap.recipe.problems import as_list_of_texts, checked
from remap.recipe.schema import DataSpec, ShrinkSpec, TeacherSpec
from remap.remapping.architecture.shrink import Shrunk
from remap.runs.run_dir import default_path
from remap.runs.task import require_tuned


def tune(
    recipe: Recipe | str | Mapping[str, Any],
    *,
    settings: Iterable[str] = (),
    output: str | Path | None = None,
    progress: Progress = Silent(),
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Tune a student without a teacher: the same loop as ``distill``, labels only.

    Args:
        recipe: As for ``distill``, without a teacher.
        settings: As ``--set``: ``["train.lr=0.01", "method.rank=4"]``.
        output: The run directory to make; by default the next number under ``runs/``.
        progress: Gets messages and the progress of long work (``remap.progress.Progress``).
        callbacks: Your own Python in the run (``remap.Callback``).

    Raises:
        RecipeError: The recipe cannot be used, or has a teacher.
        RemapError: Anything else a user can mend.
    """
    options = isinstance(recipe, Mapping)
    # Options are resolved here: ``as_recipe`` would add the embedded teacher to them.
    settings = as_list_of_texts("settings", settings, "remap.tune")
    chosen = resolve(None, recipe, settings) if isinstance(recipe, Mapping) else as_recipe(recipe, settings)
    if chosen.named_teachers:
        where = "options" if options else chosen.name
        raise RecipeError(["teacher: remap.tune has none; use remap.distill"], where)
    return start(chosen, output, progress, callbacks=callbacks)


def evaluate(
    run: str | Path, data: str | None = None, *, skip_bad: bool = False, progress: Progress = Silent()
) -> dict[str, Any]:
    """Return the accuracy of a finished run's student, overall and of each class.

    Args:
        run: The run directory.
        data: Other images with the same class names, all of them; None is the run's own evaluation split.
        skip_bad: Leave unreadable images out instead of refusing.

    Returns:
        accuracy, correct, images; classes: class, images and accuracy of each; left_out and skipped files.

    Raises:
        RemapError: The run has no tuned student, its task is damaged, or the images do not fit it.
    """
    return evaluate_run(expanded(run), data, skip_bad, progress)


def compare(
    recipe: Recipe | str | Mapping[str, Any],
    methods: str | Sequence[str] | None = None,
    *,
    seeds: int = DEFAULT_SEEDS,
    sweeps: Sequence[str] = (),
    loss_sets: Sequence[str] = (),
    budget: str | None = None,
    search: str | None = None,
    jobs: int | Literal["auto"] = 1,
    settings: Iterable[str] = (),
    output: str | Path | None = None,
    progress: Progress = Silent(),
) -> dict[str, Any]:
    """Compare methods, each with and without the teacher, on the same data, budget and seeds.

    Args:
        recipe: As for ``distill``.
        methods: Names, combinations (a+b), categories, "all", or METHOD@INIT for a student with the teacher's weights;
            None is two of each category, and one such student.
        seeds: Runs of each cell.
        sweeps: Options of methods or fields of the recipe and their values: ``["method.num_prompts=5,10"]``.
        loss_sets: Objectives with the teacher: ``["ce,kd", "ce,kd:0.5"]``; none is the recipe's own.
        budget: "epochs=12", "minutes=10" of training each, or "parameters=50000"; None is the recipe's epochs.
        search: Trials of learning rate and weight decay for each cell, "20" or "random:20"; None is declared defaults.
        jobs: How many cells run at once, in processes of their own; "auto" goes by cores, GPUs and memory. A script
            that asks for several has its own code under ``if __name__ == "__main__":``.
        settings: As ``--set``.
        output: Folder of the comparison, ``runs/compare-NAME`` by default. Finished cells are not run again.

    Returns:
        The table, as ``remap compare --json`` prints it: a row for each method, with accuracies and costs.

    Raises:
        RemapError: Anything a user can mend.
    """
    chosen, checked = chosen_methods(_words(methods)), _of_budget(recipe, settings, budget)
    # A recipe without a teacher is valid, for ``tune``.
    if checked.teacher is None:
        raise RecipeError(["teacher: missing; a comparison has one"], checked.name)
    sweeps = as_list_of_texts("sweeps", sweeps, "remap.compare")
    loss_sets = as_list_of_texts("loss_sets", loss_sets, "remap.compare")
    # Without a number, unlike a run: the same call finds its finished cells again.
    folder = expanded(output or default_path() / f"compare-{checked.name}")
    plan = Plan(sweeps, loss_sets, budget, search, str(jobs))
    return comparison.compare(checked, chosen, seeds, folder, progress, plan)


def recommend(
    recipe: Recipe | str | Mapping[str, Any],
    methods: str | Sequence[str] | None = None,
    *,
    budget: str | None = None,
    settings: Iterable[str] = (),
    output: str | Path | None = None,
    progress: Progress = Silent(),
) -> dict[str, Any]:
    """Rank methods for some images and a budget by short runs, on training images that are held out.

    Args:
        recipe: As for ``distill``.
        methods: As for ``compare``; None is two of each category.
        budget: "epochs=12" or "parameters=50000"; None is the recipe's epochs.
        settings: As ``--set``.
        output: Folder of the trials, ``runs/recommend-NAME`` by default. Finished trials are not run again.

    Returns:
        best, cheapest (of those that the images do not tell from the best), cannot_tell, and a row for each method:
        accuracies, expected, interval, told_apart.

    Raises:
        RemapError: Anything a user can mend.
    """
    checked = _of_budget(recipe, settings, budget)
    # Without a number, as in ``compare``.
    folder = expanded(output or default_path() / f"recommend-{checked.name}")
    words = _words(methods)
    return rank(checked, RANKED if words is None else chosen_methods(words), folder, progress, budget)


def _of_budget(recipe: Recipe | str | Mapping[str, Any], settings: Iterable[str], budget: str | None) -> Recipe:
    """Return a recipe whose epochs the caller may not have given beside a budget that decides them."""
    settings = as_list_of_texts("settings", settings, "remap")
    epochs = isinstance(recipe, Mapping) and recipe.get("epochs") is not None
    require_no_epochs({"epochs": epochs, "settings train.epochs": settings}, budget)
    return as_recipe(recipe, settings)


def _words(methods: str | Sequence[str] | None) -> str | None:
    return methods if methods is None or isinstance(methods, str) else ",".join(methods)


def shrink(
    teacher: str,
    output: str | Path,
    *,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    mlp: int | None = None,
    importance: Literal["taylor", "magnitude"] = "taylor",
    blocks: Literal["sensitivity", "uniform"] = "sensitivity",
    images: int = 64,
    data: str = "digits",
    seed: int = 0,
    weights: str = "pretrained",
    progress: Progress = Silent(),
) -> Shrunk:
    """Cut a student from a teacher and save it as a model folder that timm opens.

    Args:
        teacher: Short name, timm name, local-dir:FOLDER or run directory.
        output: The model folder to make.
        depth, width, heads, mlp: Blocks, channels, heads of a block, hidden units of an MLP; None keeps the teacher's.
        importance: How channels, heads and units are chosen.
        blocks: How blocks are chosen: those whose removal changes least, or evenly.
        images: Number of images of ``data`` to measure on.
        seed: Decides which images.

    Returns:
        The shapes before and after, the blocks that stay, parameters and multiply-adds.

    Raises:
        RemapError: The teacher cannot be cut so, or the folder is there already.
    """
    shape = {"depth": depth, "width": width, "heads": heads, "mlp": mlp}
    given = {name: value for name, value in shape.items() if value is not None}
    if not given:
        raise RecipeError(["nothing is to be cut: give depth, width, heads or mlp"], "remap.shrink")
    where = "remap.shrink"
    spec = checked(ShrinkSpec, {**given, "importance": importance, "blocks": blocks, "images": images}, where)
    if problems := spec.idle_problems():
        raise RecipeError(problems, where)
    larger = checked(TeacherSpec, {"model": teacher, "weights": weights}, where)
    source = checked(DataSpec, {"source": data}, where)
    require_tuned(teacher)
    return cut(larger, spec, source, expanded(output), seed, progress)
