"""``remap.find_lr``: a learning rate for what a recipe trains, by a range test."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from remap.distributed.launch import accelerator, require_one_process
from remap.engine.job import Job
from remap.engine.lr_range import LrRange, lr_range_test
from remap.errors import RecipeError, RunError
from remap.pipeline.components import build_components
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.run import as_recipe, validate_inputs
from remap.pipeline.samples import method_sample
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import make_teacher
from remap.pipeline.teacher_tuning import teachers_to_tune
from remap.pipeline.training_job import class_balance
from remap.progress import Progress, Silent
from remap.recipe import Recipe, resolve
from remap.recipe.problems import as_list_of_texts
from remap.recipe.schema import AUTO
from remap.recipe.train_checks import require_no_processes
from remap.runs.run_dir import RunDir

# Rates of the test: from one that changes nothing to one that no method bears.
FIRST, LAST = 1e-6, 10.0


def find_lr(
    recipe: Recipe | str | Mapping[str, Any],
    *,
    settings: Iterable[str] = (),
    steps: int = 100,
    progress: Progress = Silent(),
) -> LrRange:
    """Suggest ``train.lr`` for what a recipe trains: its method, losses, optimiser and images.

    Nothing is written, and the test images are not looked at.

    Args:
        recipe: As for ``remap.distill``; without a teacher as for ``remap.tune``.
        settings: As ``--set``.
        steps: Of the test, over seven powers of ten.

    Returns:
        The rates and the running mean of the loss at each, and ``suggested``.

    Raises:
        TrainingError: The loss does not fall at any rate.
        RunError: A teacher would have to be tuned first.
        RemapError: Anything else a user can mend.
    """
    require_one_process("a range test is a few steps in one process", "call it without a launcher")
    settings = as_list_of_texts("settings", settings, "remap lr")
    chosen = resolve(None, recipe, settings) if isinstance(recipe, Mapping) else as_recipe(recipe, settings)
    if chosen.choose_losses:
        raise RecipeError(["losses: a range test is of one objective (name the losses)"], chosen.name)
    require_no_processes(chosen, "a range test")
    if not chosen.train.by_steps:
        raise RecipeError([f"train.fit: {chosen.train.fit} takes no steps, and needs no learning rate"], chosen.name)
    if steps < 10:
        raise RecipeError([f"steps: {steps} are too few to see a loss fall (10 or more)"], "remap lr")
    # Some steps need no answers of other teachers: that of all labels runs in each. Nor need they the best way to
    # prepare it, which takes longer than the test.
    if AUTO in (spec.prepare for spec in chosen.teachers):
        progress.say("a head is fitted for the range test alone; a run prepares the teacher by the best way (auto)")
    teachers = tuple(
        spec.model_copy(update={"folds": None, "prepare": "probe" if spec.prepare == AUTO else spec.prepare})
        for spec in chosen.teachers
    )
    chosen = chosen.model_copy(update={"teachers": teachers})
    chosen, shared = without_idle_losses(chosen, progress).written_out(), SharedResources()
    validate_inputs(chosen, shared)
    with tempfile.TemporaryDirectory() as folder:  # a probe is fitted for the teacher, and gone afterwards
        run_dir = RunDir.create(Path(folder) / "run", chosen)
        # Only teachers that are not tuned yet are yielded; a test of some steps does not wait hours for one.
        for teacher in teachers_to_tune(chosen, run_dir, progress, shared):
            raise RunError(
                f"{teacher.title} has to be tuned before a range test",
                do="name a run that tuned it as the teacher, or set teacher.prepare=probe",
            )
        components = build_components(chosen, run_dir, progress, shared)
        student = components.student
        job = Job(
            recipe=chosen,
            student=student,
            objective=components.objective.to(accelerator().device),
            teachers=[
                make_teacher(components, number)
                for number in range(len(components.teachers))
                if components.objective.reads_teacher(number)
            ],
            source=components.training_source,
            accelerator=accelerator(),
            bf16=components.bf16,
            progress=progress,
            evaluate=dict,  # no figures: nothing is evaluated between the steps
            on_epoch=lambda _step, _history: None,
            labeled=components.labeled_share,
            sample=method_sample(student, components.views, chosen.seed) if student.attached.wants_sample else None,
            **class_balance(components, progress),
        )
        return lr_range_test(job, FIRST, LAST, steps)
