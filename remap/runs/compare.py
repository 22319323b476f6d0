"""Methods side by side: the same data, teacher, budget and seeds; every cell is a run directory like any other."""

import os
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap import files
from remap.errors import Interrupted, RecipeError, RunError
from remap.outside import absolute, read_regular
from remap.progress import Progress
from remap.recipe.checks import method_problems
from remap.recipe.schema import LossSpec, MethodSpec, Recipe
from remap.remapping import LOSSES
from remap.runs.objective import without_idle_losses
from remap.runs.records import summary_problem
from remap.runs.rundir import RunDir
from remap.tuning import CATEGORIES, METHODS, category_of, parts_of, rows_of

# One or two well-known methods of each category.
DEFAULT_METHODS = ("full", "linear", "vpt_shallow", "vpt_deep", "adaptformer", "bitfit", "lora")
# In the folder of a comparison: which recipe it is of, and the teacher that its runs learn from.
_MARKER, _TEACHER = "compare-of.txt", "teacher"
MOST_MARKER_BYTES = 1000


def chosen_methods(words: str | None) -> list[str]:
    """Methods by name or combination, by category ("prompt"), "all", or the default set for None.

    Raises:
        UnknownName: A word is none of these.
        RecipeError: A method is named twice, or a combination cannot be made.
    """
    found: list[str] = []
    for word in [word.strip() for word in words.split(",") if word.strip()] if words else DEFAULT_METHODS:
        if word == "all":
            found += METHODS.names
        elif word in CATEGORIES:
            found += [row.name for row in METHODS if row.category == word]
        else:
            if all(parts_of(word)):
                rows_of(word)
            found.append(word)
    problems = [line for name in found for line in method_problems("--methods", name)]
    if len(set(found)) < len(found):
        problems.append("--methods: a method is named twice")
    if problems:
        raise RecipeError(problems, "command line")
    return found


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    method: str
    with_teacher: bool
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.method}-{'teacher' if self.with_teacher else 'alone'}-s{self.seed}"


def plan(recipe: Recipe, methods: Sequence[str], seeds: int) -> list[Cell]:
    """Every method with and without the teacher, for ``seeds`` seeds from the recipe's own upwards.

    The cells differ from each other in method, its learning rate, losses and seed, and in nothing else; a loss on
    something that a method cannot change is left out for it, and images without labels are for the teacher alone.
    """
    cells = []
    default = LossSpec(name="ce", weight=LOSSES.row("ce").weight)
    alone = tuple(loss for loss in recipe.losses if LOSSES.row(loss.name).category == "labels") or (default,)
    for method in methods:
        spec = recipe.method if method == recipe.method.name else MethodSpec(name=method)
        for with_teacher in (False, True):
            for seed in range(recipe.seed, recipe.seed + seeds):
                losses = tuple(loss for loss in recipe.losses if not loss.is_idle(method))
                update: dict[str, Any] = {"method": spec, "seed": seed, "losses": losses}
                if not with_teacher:
                    update |= {"teacher": None, "more_teachers": (), "losses": alone}
                    update["data"] = recipe.data.labeled_part()
                    # Nor does it start from the teacher's weights.
                    update["student"] = recipe.student.model_copy(update={"init": None, "force_init": False})
                cells.append(Cell(method, with_teacher, seed, recipe.model_copy(update=update)))
    return cells


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
    missing = [cell for cell in cells if not _is_done(output / cell.name, cell)]
    if missing:
        _run(missing, output, progress)
    table = tabulate(recipe, cells, output)
    files.write_json(output / "compare.json", table)
    return table


def _run(missing: list[Cell], output: Path, progress: Progress) -> None:
    # Only here, so that a finished comparison is shown in a moment.
    from remap.bench import Bench
    from remap.engine.launch import accelerator
    from remap.running import run

    if accelerator().num_processes > 1:
        raise RunError(
            "a comparison runs its cells one after the other in one process",
            given=f"{accelerator().num_processes} processes",
            do="call remap compare without a launcher; the cells of several folders may run side by side",
        )
    bench = Bench(teacher_folder=output / _TEACHER)
    try:
        for number, cell in enumerate(missing, 1):
            path = output / cell.name
            progress.say(f"[{number}/{len(missing)}] {cell.name}")
            files.require_no_links(path, named=False)
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
    files.make_folder(output)
    marker = output / _MARKER
    digest = recipe.model_copy(update={"method": MethodSpec(name="linear")}).digest()
    begun = any(output.glob("*/summary.json"))
    if begun and os.path.lexists(marker) and _recipe_in(marker) != digest:
        raise RunError(
            f"{output} holds a comparison of another recipe; nothing in it was touched",
            do="name another --output, or repeat the words it was started with",
        )
    files.write_text(marker, digest + "\n")


def _recipe_in(marker: Path) -> str:
    """The recipe that a marker names; of what is no marker, none."""
    try:
        return read_regular(marker, MOST_MARKER_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _is_done(path: Path, cell: Cell) -> bool:
    if not (path / "recipe.yaml").is_file():
        return False
    run_dir = RunDir.open(path)
    if run_dir.recipe().digest() != cell.recipe.digest():
        raise RunError(
            f"{path} was made with other settings; nothing in it was touched",
            do="name another --output, or remove that folder",
        )
    return run_dir.is_done and summary_problem(run_dir.summary()) is None


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
