"""``remap distill`` and ``remap tune``."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remap_cli import console, estimates, launch, report, run_summary
from remap_cli.options import DISTILL, OPTIONS, TUNE, recipe_words, training_command

if TYPE_CHECKING:
    from remap.recipe import Recipe
    from remap.runs.run_dir import RunDir


@training_command(DISTILL)
def distill(values: dict[str, Any]) -> None:
    """Train a student with a teacher. With no options it runs a built-in demo.

    [dim]remap distill --teacher vit_large --student vit_small --method vpt_deep --data FOLDER[/dim]
    """
    _train(values, with_teacher=True)


@training_command(TUNE)
def tune(values: dict[str, Any]) -> None:
    """Tune a student without a teacher: the same loop, labels only."""
    _train(values, with_teacher=False)


def _train(values: dict[str, Any], *, with_teacher: bool) -> None:
    """Start the processes, then train, resume or estimate in each of them; the first one prints the result."""
    processes = values["devices"]
    # A mistake is said before any process is started.
    recipe = None if values["resume"] is not None else _new_recipe(values, with_teacher=with_teacher)
    if values["resume"] is not None and processes is None:
        processes = _run_dir(values["resume"]).recipe().train.processes
        launch.require_few(processes, values["resume"], do=f"name the number yourself: --devices {processes}")
    launch.start_processes(processes)
    show = estimates.show if values["dry_run"] else run_summary.show
    with console.Reporter(quiet=not launch.is_first()) as progress:
        if recipe is None:
            found = _resumed(values, processes, progress)
        else:
            found = _trained(recipe, values, progress, with_teacher=with_teacher)
    if launch.is_first():
        console.emit(found) if values["json"] else show(found)
    if launch.is_first() and not values["dry_run"]:
        with console.Reporter() as progress:  # after the result, which an error in the report must not hide
            report.write_at_end(values["resume"] or Path(found["run_dir"]), progress)  # it may have been moved


def _new_recipe(values: dict[str, Any], *, with_teacher: bool) -> "Recipe":
    """Return the recipe of a new run, whose folder must be free."""
    from remap.runs.run_dir import RunDir

    recipe = read_recipe(values, with_teacher=with_teacher)
    if values["output"] is not None and not values["dry_run"] and launch.is_first():
        RunDir(values["output"]).require_free()
    return recipe


def _trained(
    recipe: "Recipe", values: dict[str, Any], progress: console.Reporter, *, with_teacher: bool
) -> dict[str, Any]:
    """Return the summary of a new run, or the estimates of a dry run."""
    with progress.wait("loading PyTorch"):
        from remap.pipeline.dry_run import estimate
        from remap.pipeline.objective import without_idle_losses
        from remap.pipeline.run import start
    recipe = without_idle_losses(recipe, progress)
    if with_teacher and (values["no_baseline"] or "baseline" not in recipe.model_fields_set):
        # There is nothing to compare a backbone without a classifier with.
        recipe = recipe.model_copy(
            update={"baseline": not values["no_baseline"] and recipe.data.source is not None and not recipe.label_free}
        )
    run_summary.announce(recipe, progress)
    return estimate(recipe, progress) if values["dry_run"] else dict(start(recipe, values["output"], progress).summary)


def _resumed(values: dict[str, Any], processes: int | None, progress: console.Reporter) -> dict[str, Any]:
    """Return the summary of a run that is continued; its recipe is in its folder, the number of processes may change.

    Raises:
        RecipeError: An option was given that a resumed run does not take.
    """
    from remap.errors import RecipeError

    run: Path = values["resume"]
    given = [row for row in OPTIONS if values.get(row.name) not in (None, False, []) and DISTILL in row.commands]
    refused = [row for row in given if row.name not in ("resume", "devices", "json")]
    if refused:
        command = "distill" if _run_dir(run).recipe().named_teachers else "tune"
        reasons = {"output": "a resumed run stays in its own folder", "dry_run": "a resumed run is not estimated"}
        raise RecipeError(
            [f"{row.option}: {reasons.get(row.name, 'a resumed run keeps its own recipe')}" for row in refused],
            f"--resume {run}",
            do="resume without these options; or start a new run with the options that you want to change, in another"
            f" folder: remap {command} --recipe {shlex.quote(str(run / 'recipe.yaml'))} OPTIONS --output FOLDER",
        )
    from remap.pipeline.run import resume

    return dict(resume(_run_dir(run).path, progress, processes).summary)


def _run_dir(run: Path) -> "RunDir":
    from remap.io.paths import expanded
    from remap.runs.run_dir import RunDir

    return RunDir.open(expanded(run))


def require_one_length(values: dict[str, Any], budget: str | None) -> None:
    """Refuse epochs on the command line beside a budget that decides them, which would ignore them.

    Raises:
        RecipeError: Names both.
    """
    from remap.pipeline.comparison_budget import require_no_epochs

    given = {"--epochs": values["epochs"] is not None, "--set train.epochs": values["settings"] or ()}
    # A suite has a budget of its own, which the command line may replace.
    require_no_epochs(given, budget, None if values["budget"] else "name another budget: --budget epochs=N")


def read_recipe(values: dict[str, Any], *, with_teacher: bool) -> "Recipe":
    """Return the recipe of a training command; ``distill`` starts from the built-in default, ``tune`` has no teacher.

    Raises:
        RecipeError: It cannot be used, or its teacher is missing or superfluous.
        MissingData: Its images are not there.
    """
    from remap.errors import RecipeError
    from remap.recipe import resolve, resolve_distill

    source = values["recipe"]
    recipe = (resolve_distill if with_teacher else resolve)(source, recipe_words(values), values["settings"] or [])
    if with_teacher and recipe.teacher is None:
        raise RecipeError(["teacher: missing; `remap tune` trains without one"], source or "command line")
    if not with_teacher and recipe.named_teachers:
        raise RecipeError(["teacher: `remap tune` has none; use `remap distill`"], source or "command line")
    _require_images(recipe)
    return recipe


def _require_images(recipe: "Recipe") -> None:
    """Refuse a path where nothing is now, not in the seconds that PyTorch takes to load.

    Raises:
        MissingData: There is nothing at it.
    """
    from remap.data import is_source
    from remap.io.paths import expanded

    for word in (recipe.data.source, recipe.data.val_source):
        if word is not None and not is_source(word) and not os.path.lexists(expanded(word)):
            from remap.data.sources import find_source

            find_source(word, recipe.data.depth)
