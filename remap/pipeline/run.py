"""A run from start to end. Every command that trains calls ``run``."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap.backbones.build import require_at_hand
from remap.cache.output_format import OutputFormat
from remap.data import METRIC
from remap.data.fast_views import require_decoder
from remap.distributed.launch import accelerator, check_processes
from remap.engine.callback import Callback
from remap.engine.checkpoint_files import has_checkpoint
from remap.engine.job import Job, require_divisible
from remap.engine.loop import train
from remap.engine.state import State
from remap.errors import Interrupted, RecipeError, RemapError, RunError
from remap.io.human_size import number_of
from remap.io.paths import expanded
from remap.network import Network
from remap.pipeline.baseline import baseline_figures, baseline_recipe
from remap.pipeline.baseline_process import BaselineProcess, beside_student, fits_beside, waiting_process
from remap.pipeline.comparison_folder import shared_teacher
from remap.pipeline.components import RunComponents, build_components, require_student
from remap.pipeline.epoch_recorder import EpochRecorder
from remap.pipeline.evidence import write_evidence
from remap.pipeline.fit_at_once import fit_at_once, leave_untrained
from remap.pipeline.frozen_check import FrozenWeights, trained_text
from remap.pipeline.held_out_classes import require_each_class
from remap.pipeline.nested_runs import open_or_create
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.rebalancing import rebalance, require_correctable
from remap.pipeline.results import require_space, write_results, write_summary
from remap.pipeline.run_callbacks import called, require_callbacks
from remap.pipeline.run_path import run_path
from remap.pipeline.run_status import track_status
from remap.pipeline.samples import method_sample
from remap.pipeline.sessions import measure_sessions
from remap.pipeline.shared import SharedResources
from remap.pipeline.shrink_student import require_shape
from remap.pipeline.student_features import cache_features
from remap.pipeline.summary import evaluate_at_end, summarize
from remap.pipeline.teacher_tuning import lend_teachers, require_folds, require_unjudged, teachers_to_tune
from remap.pipeline.trackers import require_installed
from remap.pipeline.training_job import training_job, warn_before_training
from remap.pipeline.trials import chosen, trials, tried
from remap.pipeline.weak_teachers import check_teachers, require_all_useful
from remap.progress import Progress, Silent, Within
from remap.recipe import Recipe, resolve, resolve_distill
from remap.recipe.checks import require_held_out_once
from remap.recipe.in_words import losses_in_words
from remap.recipe.paths import is_run
from remap.recipe.problems import as_list_of_texts
from remap.recipe.teacher_checks import idle_options
from remap.recipe.train_checks import require_rate
from remap.runs.run_dir import RunDir, default_path
from remap.runs.task import load_task, require_as_run, require_tuned


@dataclass(frozen=True)
class Result:
    """What a run gave: its directory, its summary (also in summary.json) and the tuned student."""

    run_dir: Path
    summary: Mapping[str, Any]
    student: Network


def run(
    recipe: Recipe,
    run_dir: RunDir,
    progress: Progress = Silent(),
    shared: SharedResources | None = None,
    *,
    resuming: bool = False,
    callbacks: Sequence[Callback] = (),
    steps_after: int = 0,
) -> Result:
    """Train in ``run_dir``; its status always says how it ended.

    Args:
        steps_after: Steps of what the command trains after this run, for the time that is left.

    Raises:
        RunError: Another process is working there.
        RemapError: Anything else a user can mend.
    """
    # Written out: later changes of defaults must not change a run that is resumed.
    recipe, shared = recipe.written_out(), shared or SharedResources()
    main = accelerator().is_main_process
    with run_dir.held() if main else nullcontext(), track_status(run_dir, resuming) as clock, ExitStack() as locks:
        heard = locks.enter_context(called(callbacks, recipe, run_dir, clock))
        _require_checkpoints(recipe, run_dir, resuming)

        # The steps of this run and of its baseline, which has as many.
        shared.list_together(recipe.data)
        require_each_class(recipe, shared)
        own = shared.training_steps(recipe)
        is_beside = recipe.baseline and fits_beside(recipe.train.by_steps, own)
        baseline = own if recipe.baseline and not is_beside else 0
        waiting = waiting_process(run_dir.baseline, recipe.method.name)
        beside = locks.enter_context(waiting) if is_beside else None

        # Tune teachers: each is a run by itself, finished before anything of this one is built.
        for teacher in teachers_to_tune(recipe, run_dir, progress, shared):
            require_student(recipe, shared)  # before a teacher is tuned for hours
            later = own + baseline + steps_after
            heard_by, shares = teacher.heard_by(progress), teacher.shares(shared)
            run(teacher.recipe, teacher.run_dir, heard_by, shares, resuming=True, steps_after=later)

        if recipe.choose_losses:
            recipe = _choose_losses(recipe, run_dir, progress, shared, locks)

        # Open the data, build teachers and student as they see it, and the objective.
        components = build_components(recipe, run_dir, progress, shared)
        student = components.student
        require_all_useful(components, None)  # chance is known before anything of the student is computed
        features = cache_features(components, progress, shared)
        recorder = EpochRecorder(components, features, run_dir, clock, progress, heard)
        continues = resuming and has_checkpoint(run_dir.checkpoint)
        if resuming and not continues:
            recorder.record_machine()  # here, and not where the checkpoint is loaded
        warn_before_training(components, shared, progress)

        # A teacher that knows nothing must not teach.
        untrained = recorder.before()
        require_all_useful(components, untrained)

        # The same student by labels alone, beside this one or after it.
        alone = baseline_recipe(components, progress)
        alone_dir = None if alone is None else open_or_create(run_dir.baseline, alone)
        if alone_dir is not None and is_beside:
            locks.enter_context(beside_student(beside, alone_dir))

        # Train, and prove that what is frozen did not change.
        job = training_job(
            components, recorder, features.get("train"), shared, progress, untrained, baseline + steps_after
        )
        frozen = FrozenWeights.of(student)
        if continues and any(prepared.outputs == "memory" for prepared in components.teachers):
            progress.say("the teacher's outputs were held in memory and computed again; teacher.cache=disk stores them")
        if main:
            require_space(run_dir, job)
            run_dir.write_trainables(job.parameters())
        begun = clock.here
        try:
            state = _learn(components, recorder, job, shared, progress, resuming=resuming)
        finally:
            for teacher_outputs in job.teachers:
                teacher_outputs.close()  # other runs may share the network
        fitting = clock.here - begun
        student.model.eval()
        unchanged = frozen.require_unchanged(student)

        # Evaluate, and write the tuned student before the summary that says it is there.
        evaluations = evaluate_at_end(components, recorder, progress, state)
        summary = summarize(components, recorder, untrained, evaluations, state)
        summary |= {"frozen": unchanged, "trainables": list(job.parameters()), **tried(run_dir)}
        before = untrained and untrained.value
        summary |= measure_sessions(components, run_dir, before, evaluations.val, shared, progress)
        if main:
            write_evidence(components, run_dir.path, evaluations.val, progress)
            write_results(components, run_dir, summary, state, clock, fitting, progress)
        accelerator().wait_for_everyone()

        # What is killed from here on has the student, and lacks the comparison only.
        found = None
        if alone is not None and alone_dir is not None:
            found = _train_baseline(alone, alone_dir, beside, progress, shared, steps_after)
        if found is not None:
            summary["baseline"] = found
            if main:
                write_summary(run_dir, summary, clock, progress)
        heard.summary = summary
    return Result(run_dir.path, summary, student)


def start(
    recipe: Recipe,
    output: str | Path | None = None,
    progress: Progress = Silent(),
    shared: SharedResources | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Make a run directory and run."""
    check_processes(recipe.train.processes)
    require_callbacks(callbacks)
    # Before the run directory exists, so that a mistake leaves nothing behind.
    require_divisible(recipe.train.batch_size, accelerator().num_processes, recipe.train.accumulation)
    shared = shared or SharedResources()
    require_rate(recipe)
    validate_inputs(recipe, shared)
    recipe = without_idle_losses(recipe, progress)
    for line in idle_options(recipe, accelerator().num_processes):
        progress.say(f"note: {line}")
    with run_path(output, default_path(), f"{recipe.name}-{recipe.method.name}") as path:
        run_dir = RunDir.create(path, recipe) if accelerator().is_main_process else RunDir(path)
    return run(recipe, run_dir, progress, shared, callbacks=callbacks)


def resume(
    path: Path, progress: Progress = Silent(), processes: int | None = None, callbacks: Sequence[Callback] = ()
) -> Result:
    """Resume an interrupted run from its last checkpoint.

    Args:
        processes: The number there must be; it may differ from that of before, since the batch size is global.
    """
    path = expanded(path)
    run_dir = RunDir.open(path)
    check_processes(processes)
    require_callbacks(callbacks)
    # A finished run whose files were damaged later is written again from its checkpoint.
    damage = run_dir.damage() if run_dir.is_done else None
    if damage is not None:
        progress.say(f"{path} is finished, but {damage}; it is written again from the last checkpoint")
    elif run_dir.is_done:
        progress.say(f"{path} is finished already")
        student, _ = load_task(path)
        return Result(path, run_dir.summary(), student)
    recipe = run_dir.recipe(to_run=True)
    with run_dir.images():
        shared = SharedResources(teacher_folder=shared_teacher(run_dir))
        return run(recipe, run_dir, progress, shared, resuming=True, callbacks=callbacks)


def distill(
    recipe: Recipe | str | Mapping[str, Any],
    *,
    settings: Iterable[str] = (),
    output: str | Path | None = None,
    progress: Progress = Silent(),
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Distil a teacher into a tuned student.

    Args:
        recipe: A recipe, a shipped name or YAML file, or options: ``{"teacher": "vit_large", "method": "vpt_deep"}``.
            The options teacher, student and data also take a whole section:
            ``{"data": {"source": "X", "mixup": 0.8}}``.
        settings: As ``--set``: ``["teacher.cache=disk", "losses.tokens.layers=uniform"]``.
        output: The run directory to make; by default the next number under ``runs/``.
        progress: Gets messages, and the progress of long work with its loss
            (``remap.progress.Progress``).
        callbacks: Your own Python in the run of the student (``remap.Callback``).

    Raises:
        RemapError: Anything a user can mend.
    """
    return start(as_recipe(recipe, settings), output, progress, callbacks=callbacks)


def as_recipe(recipe: Recipe | str | Path | Mapping[str, Any], settings: Iterable[str] = ()) -> Recipe:
    """Return a recipe from a recipe, a name or file, or options (with the embedded default for what they leave out).

    Raises:
        RecipeError: It is none of these, or a value is wrong.
    """
    settings = as_list_of_texts("settings", settings, "remap")
    if not isinstance(recipe, Recipe | str | Path | Mapping):
        kinds = "a name or file, a mapping of options ({} for the embedded default), or a Recipe"
        raise RecipeError([f"recipe: should be {kinds}, got {type(recipe).__name__}"], "remap")
    if isinstance(recipe, Recipe):
        if settings:
            raise RecipeError(["settings: a recipe that is resolved already takes none"], "distill")
        return recipe
    if isinstance(recipe, str | Path):
        return resolve(recipe, settings=settings)
    return resolve_distill(None, recipe, settings)


def validate_inputs(recipe: Recipe, shared: SharedResources) -> None:
    """Check paths, models and top_k before a run directory is made, so that a mistake leaves none.

    Raises:
        RemapError: Data or a model is missing, or a number does not fit the classes.
    """
    require_held_out_once(recipe)
    require_installed(recipe)
    if recipe.data.decode == "fast":
        require_decoder()
    shared.list_together(recipe.data)
    classes = shared.classes(recipe)
    require_each_class(recipe, shared)
    require_folds(recipe, shared)
    require_unjudged(recipe, shared)
    for spec in recipe.teachers:
        OutputFormat((len(classes),), top_k=spec.top_k)
    if recipe.train.selects and recipe.train.metric == "top5" and len(classes) <= 5:
        what = f"train.metric: top5 is always 1 with {len(classes)} classes, and chooses nothing (take loss)"
        raise RecipeError([what], recipe.name)
    if recipe.student.extends is not None:
        require_tuned(recipe.student.extends)
    if (shape := recipe.student.shrink) is not None and recipe.teacher is not None:
        require_shape(recipe.teacher, shape)
    students = () if shape is not None else (recipe.student,)  # else it comes from the teacher
    for spec in (*(teacher for teacher in recipe.teachers if not teacher.is_student), *students):
        require_tuned(spec.model)
        if is_run(spec.model) or is_run(spec.weights):
            require_as_run(spec)
        else:
            require_at_hand(spec.model, spec.weights, spec.image_size)


def _learn(
    components: RunComponents,
    recorder: EpochRecorder,
    job: Job,
    shared: SharedResources,
    progress: Progress,
    *,
    resuming: bool,
) -> State:
    """Train by steps, fit the classifier at once, or leave the student as its method starts it."""
    if components.recipe.train.fit == "none":
        return leave_untrained(job, recorder)
    if not components.recipe.train.by_steps:
        return fit_at_once(components, recorder, shared, progress)
    require_correctable(components)
    progress.say(trained_text(job.parameters(), components.student))
    state = train(job, resume=resuming)
    changed = rebalance(components, progress)
    if hooks := components.student.attached.finishing:
        with progress.wait(f"{components.recipe.method.name} looks at all training images"):
            for one in hooks:
                one.finish(method_sample(components.student, components.views, components.recipe.seed, everything=True))
    if changed or hooks:
        recorder.evaluate_last(state)
    return state


def _train_baseline(
    recipe: Recipe,
    baseline: RunDir,
    beside: BaselineProcess | None,
    progress: Progress,
    shared: SharedResources,
    steps_after: int,
) -> dict[str, Any] | None:
    """Train by labels alone, if no other process did, and return the figures; None if it failed."""
    if beside is not None:
        beside.wait(progress)
        if baseline.is_done:
            return baseline_figures(baseline.summary())
    try:
        title = Within(progress, "labels only")
        found = run(recipe, baseline, title, shared, resuming=True, steps_after=steps_after)
    except Interrupted:
        raise
    except RemapError as error:  # the student is there, and the run is not lost with this
        progress.say(f"training on labels alone, to compare with, ended early: {error}")
        return None
    return baseline_figures(found.summary)


def _choose_losses(
    recipe: Recipe, run_dir: RunDir, progress: Progress, shared: SharedResources, locks: ExitStack
) -> Recipe:
    """Try some objectives, each a short run by itself, and return the recipe with the best, also in recipe.yaml."""
    # What the trials hold in memory goes with them; teachers that are tuned serve the run too.
    own = SharedResources(
        data=shared.data,
        tuned_teachers=shared.tuned_teachers,
        use_stored_teachers=shared.use_stored_teachers,
        said=shared.said,
    )
    accuracies, several = {}, list(trials(recipe, own))
    epochs = several[-1][1].train.epochs
    check_teachers(build_components(recipe, run_dir, progress, shared), progress)  # before any trial
    each = number_of(epochs, "epoch")
    progress.say(f"choosing the losses: {len(several)} objectives, {each} each, by held-out training images")
    for name, trial in several:
        lend_teachers(recipe, trial, own)
        folder = open_or_create(run_dir.trials / name, trial)
        is_done = folder.is_done  # before the run was interrupted
        found = folder.summary() if is_done else run(trial, folder, Within(progress, name), own, resuming=True).summary
        accuracies[name] = found["student"]["accuracy"]
    recipe = chosen(recipe, accuracies, shared).written_out()
    losses = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies.items())
    names = losses_in_words(recipe.losses) + ("" if recipe.teachers else ", without the teacher")
    progress.say(f"chosen: {names} (held-out {METRIC[recipe.data.task]}: {losses})")
    if accelerator().is_main_process:
        run_dir.settle(recipe)
        locks.enter_context(run_dir.held())  # recipe.yaml is another file now; the lock is on the one before
    accelerator().wait_for_everyone()
    return recipe


def _require_checkpoints(recipe: Recipe, run_dir: RunDir, resuming: bool) -> None:
    """A run that was trained before must not start from its beginning without a word."""
    trained = recipe.train.by_steps and resuming and (run_dir.path / "metrics.jsonl").is_file()
    if trained and not has_checkpoint(run_dir.checkpoint):
        raise RunError(
            f"the checkpoints of {run_dir.path} are gone; it had been trained for"
            f" {number_of(len(run_dir.metrics()), 'epoch')}",
            do=f"bring {run_dir.checkpoint} back, or start the run again in another --output",
        )
