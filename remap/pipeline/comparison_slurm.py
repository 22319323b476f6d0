"""The cells of a comparison as the tasks of a SLURM job array, by submitit; the folder lies on a shared file system."""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from remap.cache.shared_outputs import FOLDER, SharedOutputs
from remap.distributed.interrupts import watch_signals
from remap.errors import RecipeError, RunError
from remap.io.versions import install_command
from remap.pipeline.comparison_cells import Cell
from remap.pipeline.comparison_jobs import prepare_teachers
from remap.pipeline.comparison_resources import AUTO, Resources, read_slurm
from remap.pipeline.comparison_workers import require_all, run_cell
from remap.progress import CELLS, Progress, Silent
from remap.recipe.schema import Recipe

# Where submitit writes scripts and logs, in the folder of the comparison; seconds between two looks at the tasks.
LOGS, LOOK_EVERY_S = "slurm", 2.0
# How many tasks run at once where nothing is said.
AT_ONCE = 64


def run_on_slurm(
    cells: Sequence[Cell], words: str, jobs: str, output: Path, resources: Resources, progress: Progress
) -> None:
    """Run each cell as a task, up to ``jobs`` at once, and wait for all of them.

    Args:
        words: Parameters of submitit: "slurm_partition=gpu,gpus_per_node=1,timeout_min=240".

    Raises:
        RunError: submitit is not installed or cannot submit, or cells failed; all others are finished.
        RecipeError: A parameter cannot be used.
    """
    try:
        import submitit
    except ImportError:
        do = install_command("slurm")
        raise RunError("--slurm needs submitit, which is not installed", do=do) from None
    given = read_slurm(words)
    cluster = given.pop("cluster", "slurm")
    if cluster == "slurm":
        given.setdefault("slurm_array_parallelism", AT_ONCE if jobs == AUTO else int(jobs))
    try:
        executor = submitit.AutoExecutor(folder=output.absolute() / LOGS, cluster=cluster)
        executor.update_parameters(name="remap-compare", **given)
    except (NameError, ValueError, RuntimeError) as error:  # what submitit raises for words and without SLURM
        raise RecipeError([f"--slurm: {error}"], "command line") from error
    # Before anything is submitted: the tasks read the teachers, and a weak one is refused before they wait in a queue.
    prepare_teachers(cells, output, resources, progress)
    # As one batch, which submitit makes one job array.
    with executor.batch():
        tasks = {cell.name: executor.submit(run_task, resources.recipe, cell, output.absolute()) for cell in cells}
    progress.say(f"{len(cells)} cells as SLURM tasks; logs in {output / LOGS}")
    failed: dict[str, str] = {}
    try:
        with watch_signals(), progress.wait(CELLS, len(cells)) as shown:
            shown.advance(0, **dict.fromkeys(tasks, math.nan))
            waiting = dict(tasks)
            while waiting:
                for name, task in [(name, task) for name, task in waiting.items() if task.done()]:
                    del waiting[name]
                    raised = task.exception()
                    accuracy = math.nan if raised else task.result()
                    if raised:
                        failed[name] = str(raised)
                        progress.say(f"{name} failed: {raised}")
                    shown.advance(1, **{name: accuracy})
                time.sleep(LOOK_EVERY_S if waiting else 0)
    except BaseException:
        # Tasks outlive this process: they would wait and run without anyone who reads their results.
        for task in tasks.values():
            task.cancel()
        raise
    finally:
        shutil.rmtree(output / FOLDER, ignore_errors=True)
    require_all(failed, len(cells))


def run_task(recipe: Recipe, cell: Cell, output: Path) -> float:
    """Run one cell of a comparison of ``recipe``; return its accuracy."""
    resources = Resources(recipe, output, Silent(), SharedOutputs(output / FOLDER))
    return run_cell(cell, output, resources, Silent())
