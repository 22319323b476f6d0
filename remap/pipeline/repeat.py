"""Run a finished run again and compare: the same recipe, seed and images should give the same bits."""

import os
import shlex
from pathlib import Path
from typing import Any

import torch

from remap.data.fingerprint import fingerprint
from remap.distributed.collectives import all_reduce_max
from remap.distributed.launch import accelerator
from remap.errors import DataError, Interrupted, RunError
from remap.io.checked_json import is_count
from remap.io.human_size import number_of
from remap.io.paths import absolute
from remap.pipeline.comparison_folder import shared_teacher
from remap.pipeline.run import run as run_in
from remap.pipeline.run import start
from remap.pipeline.run_differences import FIGURES, changed_on_the_way, compare, history, outputs_on_disk
from remap.pipeline.run_path import run_path
from remap.pipeline.shared import SharedResources
from remap.progress import Progress, Silent
from remap.recipe import Recipe
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task


def repeat(
    path: Path, output: Path | None = None, workers: int | None = None, progress: Progress = Silent()
) -> dict[str, Any]:
    """Run a finished run's recipe again, in a new run directory; the first one is only read.

    Args:
        output: The run directory to make, by default the next number next to the first; a repeat that was interrupted
            is resumed.
        workers: Decoding threads; they change no result.

    Returns:
        run, repeat, equal, checks (what, first, repeat, equal), tensors that differ (name, largest_difference), what
        differs in the environment (what, first, repeat), and two that may be why, in words (first, repeat):
        changed_on_the_way, what decides the last bits and was not the same in all parts of a resumed run; and
        outputs_on_disk, the teachers whose outputs were read on disk. Empty on processes that are not the main one.

    Raises:
        RunError: It is unfinished, damaged or was made by another number of processes.
        DataError: Its images are gone or have changed.
    """
    run = RunDir.open(path)
    _require_whole(run)
    # Read before the new run begins: the first run is never written to.
    recipe, summary = run.recipe(to_run=True), run.summary()
    if "adapted" in summary:
        raise RunError(f"{run.path} was adapted, which its recipe does not say", do="give `remap adapt` again")
    command = "distill" if recipe.named_teachers else "tune"
    anew = f"remap {command} --recipe {shlex.quote(str(run.path / 'recipe.yaml'))}"
    _require_figures(run, do=f"run it anew, then repeat that: {anew}")
    _require_processes(run, summary["processes"])
    # A run may have been resumed with a different number; the summary has the last one.
    if recipe.train.processes is not None:
        recipe = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"processes": summary["processes"]})}
        )
    if workers is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    # `.` has no name.
    first = run.path if run.path.name not in ("", "..") else Path(absolute(run.path))
    # Chosen before anything is computed, so that a taken folder is an early error.
    with run_path(output, first.parent, f"{first.name}-repeat") as target:
        if output is not None:
            _require_fit(target, run, recipe)
        _run_again(run, recipe, target, summary["data"]["fingerprint"], progress)
    # One process compares the files.
    if not accelerator().is_main_process:
        return {}
    _require_figures(RunDir.open(target), do="remove that folder, or choose another --output")
    return compare(run, RunDir.open(target))


def _run_again(run: RunDir, recipe: Recipe, target: Path, images: str, progress: Progress) -> None:
    """Run in ``target``, or resume the repeat that was interrupted there.

    Args:
        images: The fingerprint of the first run's images.
    """
    # A comparison prepared its teacher for the first seed; a new one would differ.
    shared = SharedResources(teacher_folder=_prepared_teacher(run), use_stored_teachers=False)
    _require_same_images(run, recipe, shared, images, progress)
    _say_what_decides(run, progress)
    with progress.wait("comparing the frozen weights with those of the run"):
        load_task(run.path)  # refuses a backbone that is not the run's
    # As the main process sees it, which makes the folder: another one may look later, and go another way.
    main = accelerator().is_main_process
    begun = main and os.path.isfile(target / "recipe.yaml")
    begun, complete = all_reduce_max(accelerator(), begun, begun and RunDir.open(target).is_complete)
    try:
        if not begun:
            start(recipe, target, progress, shared)
        elif not complete:
            run_in(recipe, RunDir.open(target), progress, shared, resuming=True)
    except Interrupted as error:
        command = shlex.join(["remap", "repeat", str(run.path), "--output", str(target)])
        raise Interrupted(
            error.what, exit_code=error.exit_code, do=f"resume with: {command}", at_once=error.at_once
        ) from error


def _require_whole(run: RunDir) -> None:
    """Refuse a run without a result to compare with."""
    if not run.is_done:
        ended, message = run.outcome()
        raise RunError(
            f"{run.path} has no result that could be compared: it {ended}",
            given=message,
            do=f"finish it first: {run.resume_command()}",
        )


def _require_figures(run: RunDir, do: str) -> None:
    """Check before hours of training that the figures to compare are there."""
    problem = _problem(run.summary())
    if problem is None and not history(run):
        problem = "metrics.jsonl is empty"
    if problem is not None:
        raise RunError(f"{run.path} holds no figures of this version of remap", given=problem, do=do)


def _problem(summary: dict[str, Any]) -> str | None:
    """Return what is wrong with the figures of a summary; None if they can be compared."""
    try:
        for read in (lambda s: s["precision"], outputs_on_disk, *FIGURES.values()):
            read(summary)
        counts = summary["data"]
        # Not compared, but named in the message about other images.
        _ = counts["labeled_images"], counts["val_images"]
        fits = is_count(summary["processes"]) and isinstance(counts["fingerprint"], str)
    except KeyError as error:
        return f"summary.json has no {error}"
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        fits = False
    return None if fits else "entries of summary.json are not figures"


def _require_processes(run: RunDir, wanted: int) -> None:
    running = accelerator().num_processes
    if running != wanted:
        raise RunError(
            f"{run.path} was made by {number_of(wanted, 'process')}, and a repeat needs as many",
            given=number_of(running, "process"),
            do=f"`remap repeat {shlex.quote(str(run.path))}` without a launcher starts as many",
        )


def _say_what_decides(run: RunDir, progress: Progress) -> None:
    """Say where threads or processes differ: sums are split over them, so they decide the last bits."""
    # Said before the work: an unequal result would otherwise look like a fault.
    changed = changed_on_the_way(run)
    if changed:
        progress.say(
            f"{run.path} was resumed with {' and '.join(changed)}, which decides the last bits of sums: a repeat"
            " with one of them throughout may differ in its last bits"
        )
    own, theirs = torch.get_num_threads(), run.environment().get("threads", "?")
    if own != theirs:
        progress.say(
            f"PyTorch has {number_of(own, 'thread')} here and had {theirs} in {run.path}: last bits may differ"
        )


def _require_fit(target: Path, run: RunDir, recipe: Recipe) -> None:
    """Refuse the first run's folder, and a folder of another run."""
    if Path(absolute(target)).is_relative_to(absolute(run.path)):
        raise RunError(
            "a repeat cannot be stored in the run that it repeats", given=str(target), do="choose another --output"
        )
    if os.path.isfile(target / "recipe.yaml"):
        # Without paths: the images may have moved since.
        found, wanted = (one.digest(places=False) for one in (RunDir.open(target).recipe(), recipe))
        if found != wanted:
            raise RunError(
                f"{target} is a run of another recipe; nothing in it was touched", do="choose another --output"
            )


def _prepared_teacher(run: RunDir) -> Path | None:
    """Return the teacher of the run's comparison, if it is there: a repeat makes nothing in the comparison."""
    folder = shared_teacher(run)
    return folder if folder is not None and any(folder.parent.glob(f"{folder.name}*/task/task.json")) else None


def _require_same_images(run: RunDir, recipe: Recipe, shared: SharedResources, wanted: str, progress: Progress) -> None:
    with run.images():
        data = shared.index(recipe.data)
    found = fingerprint(data, progress, recipe.data.workers)
    if found == wanted:
        return
    counts = run.summary()["data"]
    raise DataError(
        f"the images are not those of {run.path}: names, labels or the content of files have changed",
        given=f"fingerprint {found[:16]}, {len(data.train)} training and {len(data.val)} evaluation images",
        allowed=f"{wanted[:16]}, {counts['labeled_images']} training and {counts['val_images']} evaluation images used",
        do=f"bring the images back that the run was made with; {run.path / 'recipe.yaml'} names their place",
    )
