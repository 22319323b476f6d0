"""Methods side by side: the same data, teacher, budget and seeds; every cell is a run directory like any other."""

import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from remap.data.fingerprint import fingerprint
from remap.errors import Interrupted, RunError
from remap.io import atomic_write
from remap.io.checked_read import absolute, read_regular
from remap.pipeline.comparison_cells import Cell, plan
from remap.pipeline.idle_losses import without_idle_losses
from remap.progress import Progress
from remap.recipe.schema import DataSpec, MethodSpec, Recipe
from remap.runs.run_dir import RunDir
from remap.tuning import CATEGORIES, category_of

# In the folder of a comparison: which recipe it is of, and the teacher that its runs learn from.
_MARKER, _TEACHER = "compare-of.txt", "teacher"
MOST_MARKER_BYTES = 1000


def compare(recipe: Recipe, methods: Sequence[str], seeds: int, output: Path, progress: Progress) -> dict[str, Any]:
    """Run what is missing and tabulate.

    Args:
        output: Folder of the comparison; finished cells in it are kept and not run again.

    Returns:
        The content of compare.json.

    Raises:
        RunError: The folder holds another comparison.
    """
    if recipe.student.shrink is not None:
        raise RunError(
            "a comparison needs a student that is there without the teacher",
            given=recipe.student.model,
            do="cut it once with `remap shrink`, then name its folder: --student local-dir:FOLDER",
        )
    recipe = without_idle_losses(recipe, progress)
    cells = plan(recipe, methods, seeds)
    _claim(output, recipe)
    held_by = cache(partial(_fingerprint, progress=progress))
    missing = [cell for cell in cells if not _is_done(output / cell.name, cell, held_by)]
    if missing:
        _run(missing, output, progress)
    table = tabulate(recipe, cells, output)
    atomic_write.write_json(output / "compare.json", table)
    return table


def _run(missing: list[Cell], output: Path, progress: Progress) -> None:
    # Only here, so that a finished comparison is shown in a moment.
    from remap.distributed.launch import require_one_process
    from remap.pipeline.run import run
    from remap.pipeline.shared import SharedResources

    require_one_process(
        "a comparison runs its cells one after the other in one process",
        "call remap compare without a launcher; the cells of several folders may run side by side",
    )
    bench = SharedResources(teacher_folder=output / _TEACHER)
    try:
        for number, cell in enumerate(missing, 1):
            path = output / cell.name
            progress.say(f"[{number}/{len(missing)}] {cell.name}")
            atomic_write.require_no_link(path)
            resuming = (path / "recipe.yaml").is_file()
            run_dir = RunDir.open(path) if resuming else RunDir.create(path, cell.recipe)
            run(cell.recipe, run_dir, progress, bench, resuming=resuming)
    except Interrupted as error:
        command = f"remap compare ... --output {shlex.quote(str(output))}"
        do = f"go on with the words it was started with: {command}; what is finished is kept"
        raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error


def shared_teacher(run: RunDir) -> Path | None:
    """Where the teacher of a run's comparison is kept, or will be; None for a run that is not part of one.

    Repeats beside the runs of a comparison have their names and a suffix, and learn from the same teacher.
    """
    recipe, place = run.recipe(), Path(absolute(run.path))
    name = Cell(recipe.method.name, True, recipe.seed, recipe).name
    is_part = place.name.startswith(name) and (place.parent / _MARKER).is_file()
    return place.parent / _TEACHER if is_part else None


def _claim(output: Path, recipe: Recipe) -> None:
    """The folder belongs to one recipe (apart from method and number of seeds), once a cell of it is finished."""
    atomic_write.make_folder(output)
    marker = output / _MARKER
    digest = recipe.model_copy(update={"method": MethodSpec(name="linear")}).digest(places=False)
    begun = any(output.glob("*/summary.json"))
    if begun and os.path.lexists(marker) and _recipe_in(marker) != digest:
        raise RunError(
            f"{output} holds a comparison of another recipe; nothing in it was touched",
            do="name another --output, or repeat the words it was started with",
        )
    atomic_write.write_text(marker, digest + "\n")


def _recipe_in(marker: Path) -> str:
    """The recipe that a marker names; of what is no marker, none."""
    try:
        return read_regular(marker, MOST_MARKER_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _is_done(path: Path, cell: Cell, held_by: Callable[[DataSpec], str]) -> bool:
    """Whether a cell has its result; where its images have moved, they have to be the same ones.

    Args:
        held_by: The fingerprint of the images at the places that a recipe names.
    """
    if not (path / "recipe.yaml").is_file():
        return False
    run_dir = RunDir.open(path)
    made = run_dir.recipe()
    if made.digest(places=False) != cell.recipe.digest(places=False):
        raise RunError(
            f"{path} was made with other settings; nothing in it was touched",
            do="name another --output, or remove that folder",
        )
    if not run_dir.is_whole:
        if made.digest() != cell.recipe.digest():
            raise RunError(
                f"{path} was begun with images at another place; nothing in it was touched",
                given=f"{_places(cell.recipe)} now, {_places(made)} then",
                do=f"if they have moved, write the new place into {path / 'recipe.yaml'} (source, val_source and"
                " unlabeled, under data); else name another --output",
            )
        return False
    summary = run_dir.summary()
    moved = summary.get("digest") != cell.recipe.digest()
    if moved and summary["data"].get("fingerprint") != held_by(cell.recipe.data):
        raise RunError(
            f"{path} was made with other images; nothing in it was touched",
            given=f"{_places(cell.recipe)} now, {_places(made)} then",
            do="name another --output, or the images that it was made with",
        )
    return True


def _places(recipe: Recipe) -> str:
    data = recipe.written_out().data
    return " and ".join(place for place in (data.source, data.val_source, data.unlabeled) if place is not None)


def _fingerprint(data: DataSpec, progress: Progress) -> str:
    from remap.pipeline.shared import SharedResources

    return fingerprint(SharedResources().index(data), progress, data.workers)


def tabulate(recipe: Recipe, cells: Sequence[Cell], output: Path) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, by category and method."""
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
