"""Compare methods with the same data, teacher, budget and seeds; every cell is a run directory like any other."""

import shlex
import statistics
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from remap.errors import Interrupted, RunError
from remap.io import atomic_write, links
from remap.pipeline.comparison_cells import Cell, comparison_cells
from remap.pipeline.comparison_folder import TEACHER, claim, fingerprint_of, is_done
from remap.pipeline.objective import without_idle_losses
from remap.progress import Progress
from remap.recipe.checks import require_held_out_once
from remap.recipe.schema import Recipe
from remap.recipe.train_checks import require_rate
from remap.runs.run_dir import RunDir
from remap.tuning import CATEGORIES, category_of


def compare(recipe: Recipe, methods: Sequence[str], seeds: int, output: Path, progress: Progress) -> dict[str, Any]:
    """Run what is missing and tabulate.

    Args:
        output: Folder of the comparison; finished runs in it are not run again.

    Returns:
        The content of compare.json.

    Raises:
        RunError: The folder holds another comparison, or the recipe is without labels.
    """
    if recipe.label_free:
        raise RunError(
            "a comparison is with students that learn from labels alone, and these losses teach no classes",
            given=", ".join(loss.name for loss in recipe.losses),
            do="add a loss on labels or logits (ce, kd), or run each method by `remap distill`",
        )
    if recipe.choose_losses:
        raise RunError(
            "a comparison is of one objective, and losses: auto chooses one for each run",
            do="name the losses: --losses ce,kd",
        )
    joint = any(spec.joint for spec in recipe.teachers)
    if joint and set(methods) != {"slad"}:
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
    recipe = without_idle_losses(recipe, progress)
    cells = comparison_cells(recipe, methods, seeds)
    claim(output, recipe)
    held_by = cache(partial(fingerprint_of, progress=progress))
    missing = [cell for cell in cells if not is_done(output / cell.name, cell, held_by)]
    if missing:
        _run(missing, output, progress)
    # Read from the run directories, also for cells that were run now.
    table = tabulate(recipe, cells, output)
    atomic_write.write_json(output / "compare.json", table)
    return table


def _run(missing: list[Cell], output: Path, progress: Progress) -> None:
    # Imported here, so that a finished comparison is shown without loading torch.
    from remap.distributed.launch import require_one_process
    from remap.pipeline.run import run
    from remap.pipeline.shared import SharedResources

    # Cells share data and teacher in one process; several would each prepare them.
    require_one_process(
        "a comparison runs its cells one after the other in one process",
        "call remap compare without a launcher; the cells of several folders may run side by side",
    )
    shared = SharedResources(teacher_folder=output / TEACHER)
    try:
        for number, cell in enumerate(missing, 1):
            path = output / cell.name
            progress.say(f"[{number}/{len(missing)}] {cell.name}")
            links.require_no_link(path)
            # An interrupted cell continues from its checkpoint.
            resuming = (path / "recipe.yaml").is_file()
            run_dir = RunDir.open(path) if resuming else RunDir.create(path, cell.recipe)
            run(cell.recipe, run_dir, progress, shared, resuming=resuming)
    except Interrupted as error:
        command = f"remap compare ... --output {shlex.quote(str(output))}"
        do = f"resume with the options it was started with: {command}; finished runs are not run again"
        raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error


def tabulate(recipe: Recipe, cells: Sequence[Cell], output: Path) -> dict[str, Any]:
    """Return mean and sample standard deviation over seeds, by category and method."""
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        row: dict[str, Any] = {"category": CATEGORIES[category_of(method)], "method": method}
        for key, with_teacher in (("alone", False), ("teacher", True)):
            mine = [cell for cell in cells if cell.method == method and cell.with_teacher == with_teacher]
            summaries = [RunDir.open(output / cell.name).summary() for cell in mine]
            row[key] = _statistics(summaries)
            row["trainable_parameters"] = summaries[0]["student"]["trainable_parameters"]
            row["total_parameters"] = summaries[0]["student"]["total_parameters"]
            row["task_bytes"] = summaries[0]["student"]["task_bytes"]
            row["learning_rate"] = summaries[0]["learning_rate"]
            if with_teacher:
                teacher, more = summaries[0]["teacher"], summaries[0].get("more_teachers", [])
        row["gain"] = row["teacher"]["mean"] - row["alone"]["mean"]
        rows.append(row)
    # In the order of the survey's categories.
    rows.sort(key=lambda row: list(CATEGORIES.values()).index(row["category"]))
    return {
        "recipe": recipe.name,
        "output": str(output),
        "data": recipe.data.source,
        "epochs": recipe.train.epochs,
        "batch_size": recipe.train.batch_size,
        "seeds": sorted({cell.seed for cell in cells}),
        "losses": {loss.name: loss.weight for loss in recipe.losses},
        "student": recipe.student.model,
        "teacher": teacher,
        "more_teachers": more,
        "rows": rows,
    }


def _statistics(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [summary["student"]["accuracy"] for summary in summaries]
    return {
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seconds": statistics.fmean(summary["train_seconds"] for summary in summaries),
    }
