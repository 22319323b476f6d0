"""A run from start to end. Every command that trains calls ``run``."""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from remap import files
from remap.assembly import Parts, assemble, features_in_training, listed, sample_for
from remap.backbones.build import add_tensors, require_at_hand
from remap.bench import Bench
from remap.data.records import Item
from remap.data.views import ViewSource
from remap.engine.checkpoint import State, has_checkpoint
from remap.engine.evaluate import Evaluation, evaluate_as
from remap.engine.fit import fit
from remap.engine.interrupt import watching
from remap.engine.job import Job, bytes_of_a_run, require_divisible
from remap.engine.launch import accelerator, check_processes, text_of_first
from remap.engine.memory import peak_bytes
from remap.engine.sharding import whole
from remap.errors import RecipeError, RunError
from remap.freezing import Frozen, trainables
from remap.network import Network
from remap.noting import Clock, noted
from remap.outputs import build_caches, teachers_in_training
from remap.outside import expanded
from remap.progress import Progress, Silent
from remap.recipe import Recipe, resolve, resolve_distill
from remap.recipe.checks import what_changes
from remap.recipe.paths import is_run
from remap.recipe.schema import EMA
from remap.remapping import LOSSES
from remap.runs.compare import shared_teacher
from remap.runs.objective import without_idle_losses
from remap.runs.rundir import RunDir, default_path, next_path
from remap.runs.task import load_task, require_size_of_run, require_tuned, save_task
from remap.teachers import require_useful


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
    recipe: Recipe, output: str | Path | None = None, progress: Progress = Silent(), bench: Bench | None = None
) -> Result:
    """Make a run directory and run."""
    check_processes(recipe.train.processes)
    require_divisible(recipe.train.batch_size, accelerator().num_processes, recipe.train.accumulation)
    bench = bench or Bench()
    _require_at_hand(recipe, bench)
    recipe = without_idle_losses(recipe, progress)
    stem = f"{recipe.name}-{recipe.method.name}"
    path = expanded(output) if output is not None else next_path(default_path(), stem)
    path = Path(text_of_first(str(path)))  # another run may have taken the name that the others have found free
    run_dir = RunDir.create(path, recipe) if accelerator().is_main_process else RunDir(path)
    return run(recipe, run_dir, progress, bench)


def _require_at_hand(recipe: Recipe, bench: Bench) -> None:
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
    bench = Bench()
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
    with watching(), TemporaryDirectory(prefix="remap-cache-") as folder:
        path = Path(text_of_first(folder)) / "run"
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
        return run(recipe, run_dir, progress, Bench(teacher_folder=shared_teacher(run_dir)), resuming=True)


def run(
    recipe: Recipe,
    run_dir: RunDir,
    progress: Progress = Silent(),
    bench: Bench | None = None,
    *,
    resuming: bool = False,
) -> Result:
    """Train in ``run_dir``; its status always says how it ended.

    Raises:
        RunError: Another process is working there.
        RemapError: Anything else a user can mend.
    """
    recipe = recipe.written_out()
    with run_dir.held() if accelerator().is_main_process else nullcontext(), noted(recipe, run_dir, resuming) as clock:
        return _run(recipe, run_dir, progress, bench or Bench(), resuming, clock)


def _run(recipe: Recipe, run_dir: RunDir, progress: Progress, bench: Bench, resuming: bool, clock: Clock) -> Result:
    if resuming and (run_dir.path / "metrics.jsonl").is_file() and not has_checkpoint(run_dir.checkpoint):
        raise RunError(
            f"the checkpoints of {run_dir.path} are gone; it had been trained for {len(run_dir.metrics())} epochs",
            do=f"bring {run_dir.checkpoint} back, or start the run again in another --output",
        )
    device = accelerator().device
    parts = assemble(recipe, run_dir, progress, bench)

    features = features_in_training(parts, progress)
    idle = [loss.name for loss in recipe.losses if LOSSES.row(loss.name).category == "labels"]
    if idle and parts.labeled_share == 0.0:
        progress.say(f"{', '.join(idle)} teaches nothing: the student learns from images without labels only")
    _say_what_parts_change(parts, progress)

    def check(source: ViewSource, what: str) -> Evaluation:
        kept = features.get("val") if source is parts.views.val else None
        return evaluate_as(recipe, parts.student, source, accelerator(), progress, what, kept)

    initial = check(parts.views.val, "the untrained student")
    for teacher in parts.teachers:
        require_useful(teacher, initial, parts.views.val)
    teachers = teachers_in_training(parts, bench, progress)
    finals: list[Evaluation] = []

    def each_epoch() -> dict[str, float]:
        parts.views.require_few_bad(recipe.data.max_bad)
        finals[:] = [check(parts.views.val, "the student")]
        return {"accuracy": finals[0].accuracy}

    def each_record(history: list[dict[str, Any]]) -> None:
        try:
            run_dir.write_metrics(history)
            run_dir.set_status("running", seconds=clock.seconds)
        except RunError as error:  # written anew after the next epoch, and at the end
            progress.say(f"the metrics of this epoch are not written yet: {error.what}")

    job = Job(
        recipe=recipe,
        student=parts.student,
        objective=parts.objective.to(device),
        teachers=teachers,
        source=parts.lessons,
        accelerator=accelerator(),
        bf16=parts.bf16,
        progress=progress,
        data_digest=parts.views.digest(progress),
        weights_digest=_weights_digest(parts),
        evaluate=each_epoch,
        on_epoch=each_record,
        checkpoint=run_dir.checkpoint,
        faults=run_dir.fault,
        labeled=parts.labeled_share,
        features=features.get("train"),
        sample=sample_for(parts) if parts.student.attached.wants_sample else None,
    )
    frozen = Frozen.of(parts.student)
    if accelerator().is_main_process:
        written = sum(path.stat().st_size for path in run_dir.checkpoint.glob("*"))
        missing = max(0, bytes_of_a_run(job.student, job.objective, job.teachers) - written)
        files.require_space(run_dir.path, missing, "its checkpoints and the tuned student")
        run_dir.write_trainables(trainables(parts.student))
    progress.say(
        f"training {len(parts.student.trained)} tensors, {parts.student.num_trainable:,} parameters "
        f"({run_dir.trainables}); {frozen.tensors} tensors are frozen, SHA-256 {frozen.sha256[:16]}"
    )
    begun = clock.here
    try:
        state = fit(job, resume=resuming)
    finally:
        for teacher in teachers:
            teacher.close()  # other runs may share the network
    fitting = clock.here - begun
    parts.student.model.eval()
    unchanged = frozen.require_unchanged(parts.student)
    for number, prepared in enumerate(parts.teachers):
        if prepared.spec.model == EMA:
            average = evaluate_as(recipe, prepared.network, parts.views.val, accelerator(), progress, "the average")
            parts.teachers[number] = replace(prepared, accuracy=average.accuracy)
    bad = parts.lessons.bad_names()
    if bad:
        progress.say(f"skipped {len(bad)} training image(s) that cannot be read: {listed(bad)}")
    final = finals[0] if finals else check(parts.views.val, "the student")
    summary = _summary(parts, run_dir, initial, final, state)
    summary["frozen"], summary["trainables"] = unchanged, list(parts.student.trained)
    if parts.views.test is not None:
        summary["student"]["test_accuracy"] = check(parts.views.test, "the test split").accuracy
    if accelerator().is_main_process:
        options = recipe.method.options
        patience = 3600.0 if accelerator().num_processes == 1 else 300.0  # the others wait
        keep = partial(files.once_there_is_room, seconds=patience, say=progress.say)
        keep(lambda: run_dir.write_metrics(state.history))
        summary["student"]["task_bytes"] = keep(
            lambda: save_task(run_dir.task, parts.student, parts.views.view, recipe.method.name, options)
        )
        known = clock.here - fitting + state.seconds  # a part that was killed noted less than its checkpoint knows
        summary["seconds"] = clock.told = round(max(clock.seconds, known), 2)
        keep(lambda: run_dir.write_summary(summary))
    accelerator().wait_for_everyone()
    return Result(run_dir.path, summary, parts.student)


def _weights_digest(parts: Parts) -> str:
    """Which weights the student and its teachers came with, and those of the teachers' heads."""
    digest = hashlib.sha256(parts.student.identity.sha256.encode())
    for teacher in parts.teachers:
        digest.update(teacher.network.identity.sha256.encode())
        if teacher.spec.model != EMA:  # which changes in training
            add_tensors(digest, {name: whole(tensor) for name, tensor in teacher.network.tensors.items()})
    return digest.hexdigest()[:16]


def _say_what_parts_change(parts: Parts, progress: Progress) -> None:
    """Name what depends on how a batch is divided, over processes and accumulation steps."""
    train = parts.recipe.train
    count = accelerator().num_processes * train.accumulation
    if count == 1:
        return
    if parts.student.learns_batch_statistics:
        progress.say("batch statistics are those of each process's own part of a batch, so results depend on the parts")
    comparing = [loss.name for loss in parts.recipe.losses if LOSSES.row(loss.name).over_batch]
    if comparing:
        size = min(train.batch_size, len(parts.lessons.split)) // count
        progress.say(
            f"{', '.join(comparing)}: images are compared within each part of a batch, of {size}, so results depend on "
            "the parts" + ("; of one image there is nothing to compare" if size == 1 else "")
        )


def _summary(parts: Parts, run_dir: RunDir, initial: Evaluation, final: Evaluation, state: State) -> dict[str, Any]:
    recipe, student, views = parts.recipe, parts.student, parts.views
    summary: dict[str, Any] = {
        "run_dir": str(run_dir.path),
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "seed": recipe.seed,
        "method": recipe.method.name,
        "losses": {loss.name: loss.weight for loss in recipe.losses},
        "learning_rate": recipe.learning_rate(student.anatomy.width),
        "epochs": recipe.train.epochs,
        "processes": accelerator().num_processes,
        "device": str(accelerator().device),
        "precision": "bf16" if parts.bf16 else "fp32",
        "data": {
            "source": views.data.source,
            "classes": len(views.data.classes),
            "train_images": len(parts.lessons.split),
            "labeled_images": round(len(parts.lessons.split) * parts.labeled_share),
            "val_images": len(views.val.split),
            "split": views.data.split_rule,
            "skipped": [list(item) for item in (*views.skipped, *parts.lessons.bad_names())],
            "fingerprint": views.fingerprint(),
        },
        "student": {
            "model": student.identity.model,
            "backbone_sha256": student.identity.sha256,
            "accuracy": final.accuracy,
            "correct": final.correct,
            "initial_accuracy": initial.accuracy,
            "trainable_parameters": student.num_trainable,
            "total_parameters": student.num_parameters,
        },
        "train_seconds": round(state.seconds, 2),
        "faults": {
            "skipped_steps": state.skipped,
            "learning_rate_factor": state.lr_factor,
            "accumulation": state.accumulation,
        },
        "peak_memory_bytes": peak_bytes(accelerator().device),
        "final_losses": {k: v for k, v in state.history[-1].items() if k not in ("epoch", "accuracy", "seconds")},
    }
    if parts.inherited is not None:
        summary["student"]["init"] = parts.inherited.to_dict()
    if parts.teachers:
        summary["teacher"] = parts.teachers[0].to_dict()
    if len(parts.teachers) > 1:
        summary["more_teachers"] = [teacher.to_dict() for teacher in parts.teachers[1:]]
    return summary
