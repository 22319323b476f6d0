"""Compare methods with the same data, teacher, budget and seeds; every cell is a run directory like any other."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from remap.errors import Interrupted
from remap.io.human_size import number_of
from remap.pipeline.comparison_budget import read_budget, with_epochs, within_minutes, within_parameters
from remap.pipeline.comparison_cells import DEFAULT_METHODS, Cell, comparison_cells
from remap.pipeline.comparison_files import write_tables
from remap.pipeline.comparison_folder import SEARCH, TEACHER, claim, fingerprint_of, is_done, require_same_images
from remap.pipeline.comparison_plan import Plan, require_possible
from remap.pipeline.comparison_resources import Resources, read_jobs
from remap.pipeline.comparison_search import Search, held_out, judge_teachers, searched
from remap.pipeline.comparison_table import tabulate
from remap.pipeline.held_out_classes import require_each_class
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.teacher_tuning import require_folds
from remap.progress import Progress
from remap.recipe.schema import Recipe
from remap.recipe.teacher_checks import idle_options
from remap.runs.environment import command


def compare(
    recipe: Recipe, methods: Sequence[str], seeds: int, output: Path, progress: Progress, plan: Plan = Plan()
) -> dict[str, Any]:
    """Run what is missing and tabulate.

    Args:
        output: Folder of the comparison; finished runs in it are not run again.

    Returns:
        The content of compare.json.

    Raises:
        RunError: The folder holds another comparison, or the recipe is without labels.
        RecipeError: The plan cannot be carried out.
    """
    # Mistakes in the options are found before the folder is claimed and any image is decoded.
    require_possible(recipe, methods, seeds, output, plan)
    budget, search = read_budget(plan.budget), Search.read(plan.search)
    jobs = read_jobs(plan.jobs, budget)
    recipe = without_idle_losses(recipe, progress)
    for line in idle_options(recipe, processes=1):
        progress.say(f"note: {line}")
    # Before the cells are made: labels alone take as many steps as these epochs have.
    if budget is not None and budget[0] == "epochs":
        recipe = with_epochs(recipe, int(budget[1]))
    resources = Resources(recipe, output, progress)
    settled = partial(without_idle_losses, progress=progress)
    cells = comparison_cells(recipe, methods, seeds, plan.sweeps, plan.loss_sets, resources.images_of, settled)
    cells = resources.with_possible_inits(cells, optional=tuple(methods) == DEFAULT_METHODS)
    for cell in (one for one in cells if not _has_ended(output, one)):  # finished ones are shown without their images
        require_each_class(cell.recipe if search is None else held_out(cell.recipe), resources.first)
        require_folds(cell.recipe, resources.first)
    left_out: dict[str, str] = {}
    if budget is not None and budget[0] == "parameters":
        cells, left_out = within_parameters(cells, int(budget[1]), len(resources.first.classes(recipe)))
    else:
        cells, left_out = resources.with_fitting_methods(cells)
    # Only now: what is refused above leaves the folder as it is.
    claim(output, recipe)
    # After the claim, since what is measured is written into the folder.
    if budget is not None and budget[0] == "minutes":
        cells = within_minutes(cells, budget[1], output, progress)
    # A fingerprint reads all images: once for each data section, not once for each cell.
    held_by = cache(partial(fingerprint_of, progress=progress))
    found: dict[str, dict[str, Any]] = {}
    with resumable(output):
        if search is not None:
            # Before any trial, whose few images find no teacher weak.
            taught = [cell for cell in cells if not _has_ended(output, cell)]
            judge_teachers(taught, output, resources.of, progress)
            cells, found = searched(cells, search, output / SEARCH, resources.of, held_by, progress)
        # Cells with equal recipes share a name, and so a run directory.
        unique = {cell.name: cell for cell in cells}
        missing = [cell for cell in unique.values() if not is_done(output / cell.name, cell, held_by)]
        if missing:
            for cell in (one for one in unique.values() if one not in missing):
                require_same_images(output / cell.name, cell, held_by)
            missing.sort(key=lambda cell: not cell.with_teacher)  # a weak teacher is found before any training
            # Imported here, so that a finished comparison is shown without loading torch.
            if plan.slurm is not None:
                from remap.pipeline.comparison_slurm import run_on_slurm

                run_on_slurm(missing, plan.slurm, jobs, output, resources, progress)
            else:
                from remap.pipeline.comparison_jobs import run_cells

                run_cells(missing, jobs, output, resources, progress)
    # Read from the run directories, also for cells that were run now.
    table = tabulate(recipe, cells, output) | {"budget": plan.budget, "search": found, "left_out": left_out}
    write_tables(table, output)
    _name_others(output, cells, progress)
    return table


def _name_others(output: Path, cells: Sequence[Cell], progress: Progress) -> None:
    """Say which finished runs of the folder the table does not hold, since this command does not name them."""
    finished = {path.parent.name for path in output.glob("*/summary.json") if not path.parent.name.startswith(TEACHER)}
    if others := sorted(finished - {cell.name for cell in cells}):
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        progress.say(
            f"{output} also holds {number_of(len(others), 'finished run')} of an earlier command ({shown}):"
            " to see them in one table, name their methods, seeds and sweeps too"
        )


def _has_ended(output: Path, cell: Cell) -> bool:
    return os.path.isfile(output / cell.name / "summary.json")  # False also for names that no folder can have


@contextmanager
def resumable(output: Path, name: str = "compare") -> Iterator[None]:
    """Say of an interruption how a command with several runs is resumed."""
    try:
        yield
    except Interrupted as error:
        words = command()
        is_ours = words[0] == "remap" or words[:3] == ["python", "-m", "remap_cli"]  # not a program that calls remap
        line = shlex.join(words) if is_ours else f"remap {name} ... --output {shlex.quote(str(output))}"
        do = f"resume with the options it was started with: {line}; finished runs are not run again"
        raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error
