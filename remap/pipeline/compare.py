"""Compare methods with the same data, teacher, budget and seeds; every cell is a run directory like any other."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from remap.errors import Interrupted, RunError
from remap.pipeline.comparison_budget import read_budget, with_epochs, within_minutes, within_parameters
from remap.pipeline.comparison_cells import DEFAULT_METHODS, comparison_cells, split_word
from remap.pipeline.comparison_files import write_tables
from remap.pipeline.comparison_folder import claim, fingerprint_of, is_done
from remap.pipeline.comparison_resources import Resources, read_jobs, read_slurm
from remap.pipeline.comparison_search import FOLDER as SEARCH
from remap.pipeline.comparison_search import Search, require_searchable, searched
from remap.pipeline.comparison_table import tabulate
from remap.pipeline.objective import without_idle_losses
from remap.progress import Progress
from remap.recipe.checks import require_held_out_once
from remap.recipe.schema import Recipe
from remap.recipe.train_checks import require_rate


@dataclass(frozen=True)
class Plan:
    """What a comparison does besides running each method with and without the teacher.

    Attributes:
        sweeps: ``KEY=V1,V2`` each; see ``comparison_cells``.
        loss_sets: Objectives with the teacher, as words.
        budget: "epochs=N", "minutes=N" of training each, or "parameters=N"; None is the recipe's epochs.
        search: Trials of learning rate and weight decay for each method and loss set: "20" or "random:20".
        jobs: How many cells run at once: a number, or "auto" by cores, GPUs and memory.
        slurm: Parameters of submitit, to run the cells as a SLURM job array; None runs them on this machine.
    """

    sweeps: Sequence[str] = ()
    loss_sets: Sequence[str] = ()
    budget: str | None = None
    search: str | None = None
    jobs: str = "1"
    slurm: str | None = None


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
    require_comparable(recipe, methods)
    budget, search = read_budget(plan.budget), Search.read(plan.search)
    jobs = read_jobs(plan.jobs, budget)
    if plan.slurm is not None:
        read_slurm(plan.slurm)
    if search is not None:
        require_searchable(recipe)
    recipe = without_idle_losses(recipe, progress)
    # Before the cells are made: labels alone take as many steps as these epochs have.
    if budget is not None and budget[0] == "epochs":
        recipe = with_epochs(recipe, int(budget[1]))
    resources = Resources(recipe, output, progress)
    cells = comparison_cells(recipe, methods, seeds, plan.sweeps, plan.loss_sets, resources.images_of)
    cells = resources.with_possible_inits(cells, optional=tuple(methods) == DEFAULT_METHODS)
    left_out: dict[str, str] = {}
    if budget is not None and budget[0] == "parameters":
        cells, left_out = within_parameters(cells, int(budget[1]), len(resources.first.classes(recipe)))
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
            cells, found = searched(cells, search, output / SEARCH, resources.of, held_by, progress)
        # Cells with equal recipes share a name, and so a run directory.
        unique = {cell.name: cell for cell in cells}
        missing = [cell for cell in unique.values() if not is_done(output / cell.name, cell, held_by)]
        if missing:
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
    return table


def require_comparable(recipe: Recipe, methods: Sequence[str]) -> None:
    """Refuse recipes whose methods cannot be held against each other.

    Raises:
        RunError: They learn no classes, choose their losses, or have a student or teacher that not all can have.
    """
    if recipe.label_free:
        raise RunError(
            "a comparison is with students that learn from labels alone, and these losses teach no classes",
            given=", ".join(loss.name for loss in recipe.losses),
            do="add a loss on labels or logits (ce, kd), or run each method by `remap distill`",
        )
    if recipe.data.source is None:
        raise RunError(
            "a comparison is with students that learn from labels alone, and there are no labelled images",
            do="name some: --data FOLDER, or run each method by `remap distill`",
        )
    if recipe.choose_losses:
        raise RunError(
            "a comparison is of one objective, and losses: auto chooses one for each run",
            do="name the losses: --losses ce,kd",
        )
    joint = any(spec.joint for spec in recipe.teachers)
    if joint and {split_word(word)[0] for word in methods} != {"slad"}:
        raise RunError(
            "a joint teacher shares adapters with slad alone",
            given=f"teacher.joint=true, methods {', '.join(methods)}",
            do="compare slad (--methods slad), or leave teacher.joint out",
        )
    require_held_out_once(recipe)
    require_rate(recipe)
    if recipe.student.shrink is not None:
        raise RunError(
            "a comparison needs a student that exists without the teacher",
            given=recipe.student.model,
            do="cut it once with `remap shrink`, then name its folder: --student local-dir:FOLDER",
        )


@contextmanager
def resumable(output: Path, command: str = "compare") -> Iterator[None]:
    """Say of an interruption how a command with several runs is resumed."""
    try:
        yield
    except Interrupted as error:
        line = f"remap {command} ... --output {shlex.quote(str(output))}"
        do = f"resume with the options it was started with: {line}; finished runs are not run again"
        raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error
