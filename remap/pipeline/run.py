"""A run from start to end. Every command that trains calls ``run``."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from remap.backbones.build import require_at_hand
from remap.cache.records import Item
from remap.distributed.interrupts import watch_signals
from remap.distributed.launch import accelerator, broadcast_str, check_processes
from remap.engine.job import require_divisible
from remap.errors import RecipeError
from remap.io.checked_read import expanded
from remap.network import Network
from remap.pipeline.assemble import assemble
from remap.pipeline.compare import shared_teacher
from remap.pipeline.idle_losses import without_idle_losses
from remap.pipeline.run_status import track_status
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import build_caches
from remap.pipeline.train import carry_out
from remap.progress import Progress, Silent
from remap.recipe import Recipe, resolve, resolve_distill
from remap.recipe.checks import what_changes
from remap.recipe.paths import is_run
from remap.recipe.schema import EMA
from remap.runs.run_dir import RunDir, default_path, next_path
from remap.runs.task import load_task, require_size_of_run, require_tuned


@dataclass(frozen=True)
class Result:
    """What a run gave: its directory, its summary (also in summary.json) and the tuned student."""

    run_dir: Path
    summary: Mapping[str, Any]
    student: Network


def distill(
    recipe: Recipe | str | Mapping[str, Any], *, settings: Iterable[str] = (), output: str | Path | None = None
) -> Result:
    """Distil a teacher into a tuned student.

    Args:
        recipe: A recipe, a shipped name or YAML file, or words: ``{"teacher": "vit_large", "method": "vpt_deep"}``.
            The words teacher, student and data also take a whole section: ``{"data": {"source": "X", "mixup": 0.8}}``.
        settings: As ``--set``: ``["teacher.cache=disk", "losses.tokens.layers=uniform"]``.
        output: The run directory to make; by default the next number under ``runs/``.

    Raises:
        RemapError: Anything a user can mend.
    """
    return start(as_recipe(recipe, settings), output)


def as_recipe(recipe: Recipe | str | Mapping[str, Any], settings: Iterable[str] = ()) -> Recipe:
    """A recipe from a recipe, a name or file, or words (with the embedded default unless they say otherwise)."""
    settings = tuple(settings)
    if isinstance(recipe, Recipe):
        if settings:
            raise RecipeError(["settings: a recipe that is resolved already takes none"], "distill")
        return recipe
    return resolve(recipe, settings=settings) if isinstance(recipe, str) else resolve_distill(None, recipe, settings)


def start(
    recipe: Recipe,
    output: str | Path | None = None,
    progress: Progress = Silent(),
    bench: SharedResources | None = None,
) -> Result:
    """Make a run directory and run."""
    check_processes(recipe.train.processes)
    require_divisible(recipe.train.batch_size, accelerator().num_processes, recipe.train.accumulation)
    bench = bench or SharedResources()
    _require_at_hand(recipe, bench)
    recipe = without_idle_losses(recipe, progress)
    stem = f"{recipe.name}-{recipe.method.name}"
    path = expanded(output) if output is not None else next_path(default_path(), stem)
    path = Path(broadcast_str(str(path)))  # another run may have taken the name that the others have found free
    run_dir = RunDir.create(path, recipe) if accelerator().is_main_process else RunDir(path)
    return run(recipe, run_dir, progress, bench)


def _require_at_hand(recipe: Recipe, bench: SharedResources) -> None:
    """A mistyped path or model leaves no run directory behind, nor does a number that the classes do not allow."""
    classes = bench.classes(recipe.data)
    for spec in recipe.teachers:
        Item((len(classes),), top_k=spec.top_k)
    students = () if recipe.student.shrink is not None else (recipe.student,)  # it comes from the teacher
    for spec in (*(teacher for teacher in recipe.teachers if not teacher.is_student), *students):
        require_tuned(spec.model)
        if is_run(spec.model) or is_run(spec.weights):
            require_size_of_run(spec)
        else:
            require_at_hand(spec.model, spec.weights, spec.image_size)


def build_cache(recipe: Recipe, progress: Progress = Silent()) -> list[dict[str, Any]]:
    """Prepare a recipe's teachers as a run would, and keep their outputs on disk; a run of the same words reads them.

    Returns:
        One entry a teacher: teacher, key, folder, items, images, computed, bytes, seconds.
    """
    check_processes(recipe.train.processes)
    bench = SharedResources()
    _require_at_hand(recipe, bench)
    for spec in recipe.teachers:
        changing = what_changes(spec, recipe.data)
        if spec.model == EMA and len(recipe.teachers) > 1:
            continue  # the others are kept
        if changing is not None:
            raise RecipeError([f"teacher {spec.model}: nothing can be kept, since {changing}"], "cache build")
        if spec.prepare not in ("probe", "none") and not is_run(spec.model):
            raise RecipeError(
                [
                    f"teacher.prepare: {spec.model} would be tuned ({spec.prepare}) for this build, and again for every"
                    f" run (tune it once: remap tune --student {spec.model} --method {spec.prepare} --output FOLDER;"
                    " then name it here and there: --teacher FOLDER)"
                ],
                "cache build",
            )
    recipe = without_idle_losses(recipe, progress).written_out()
    with watch_signals(), TemporaryDirectory(prefix="remap-cache-") as folder:
        path = Path(broadcast_str(folder)) / "run"
        run_dir = RunDir.create(path, recipe) if accelerator().is_main_process else RunDir(path)
        accelerator().wait_for_everyone()
        parts = assemble(recipe, run_dir, progress, bench)
        found = build_caches(parts, progress)
        accelerator().wait_for_everyone()  # the folder of the first process goes with it
        return found


def resume(path: Path, progress: Progress = Silent(), processes: int | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint.

    Args:
        processes: The number there must be; it need not be that of before, since the batch size is global.
    """
    path = expanded(path)
    run_dir = RunDir.open(path)
    recipe = run_dir.recipe()
    check_processes(processes)
    damage = run_dir.damage() if run_dir.is_done else None
    if damage is not None:
        progress.say(f"{path} is finished, but {damage}; it is written again from the last checkpoint")
    elif run_dir.is_done:
        progress.say(f"{path} is finished already")
        student, _ = load_task(path)
        return Result(path, run_dir.summary(), student)
    with run_dir.images():
        return run(recipe, run_dir, progress, SharedResources(teacher_folder=shared_teacher(run_dir)), resuming=True)


def run(
    recipe: Recipe,
    run_dir: RunDir,
    progress: Progress = Silent(),
    bench: SharedResources | None = None,
    *,
    resuming: bool = False,
) -> Result:
    """Train in ``run_dir``; its status always says how it ended.

    Raises:
        RunError: Another process is working there.
        RemapError: Anything else a user can mend.
    """
    recipe = recipe.written_out()
    with (
        run_dir.held() if accelerator().is_main_process else nullcontext(),
        track_status(recipe, run_dir, resuming) as clock,
    ):
        summary, student = carry_out(recipe, run_dir, progress, bench or SharedResources(), clock, resuming=resuming)
    return Result(run_dir.path, summary, student)
