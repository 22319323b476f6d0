"""What the training loop of one run works on, and what it calls back after an epoch and when it resumes."""

import hashlib
from collections.abc import Sequence
from typing import Any

from remap.backbones.build import add_tensors
from remap.cache.frozen_features import FrozenFeatures
from remap.distributed.collectives import share_unreadable
from remap.distributed.launch import accelerator
from remap.distributed.sharding import gather_full
from remap.engine.evaluate import Evaluation, evaluate_as
from remap.engine.job import Job
from remap.engine.state import State
from remap.errors import RunError
from remap.pipeline.components import RunComponents
from remap.pipeline.run_status import RunClock
from remap.pipeline.samples import method_sample
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import teachers_in_training
from remap.progress import Progress
from remap.recipe.schema import EMA
from remap.remapping import LOSSES
from remap.runs.hardware import machine
from remap.runs.run_dir import RunDir


class RunRecorder:
    """Evaluates the student after an epoch and writes what a run directory shows while the run lasts.

    Attributes:
        last: The student's evaluation after the newest epoch that was trained here; None before.
    """

    def __init__(
        self,
        components: RunComponents,
        features: FrozenFeatures | None,
        run_dir: RunDir,
        clock: RunClock,
        progress: Progress,
    ) -> None:
        self.components, self.features, self.run_dir = components, features, run_dir
        self.clock, self.progress = clock, progress
        self.last: Evaluation | None = None

    def evaluate(self, title: str = "the student") -> Evaluation:
        """Evaluate the student on the evaluation images."""
        parts = self.components
        return evaluate_as(
            parts.recipe, parts.student, parts.views.val, accelerator(), self.progress, title, self.features
        )

    def after_epoch(self) -> dict[str, float]:
        """Refuse too many unreadable training images, then return the metrics of the student."""
        views = self.components.views
        for source in (views.train, views.unlabeled):
            if source is not None:  # each process has found those of its own share
                share_unreadable(accelerator(), source)
        views.require_few_bad(self.components.recipe.data.max_bad)
        self.last = self.evaluate()
        return {"accuracy": self.last.accuracy}

    def record_epoch(self, history: Sequence[dict[str, Any]]) -> None:
        """Write the metrics so far. A full disk does not end a run: they are written anew after the next epoch."""
        try:
            self.run_dir.write_metrics(list(history))
            # Status carries the time so far: a run that is killed later resumes from it.
            self.run_dir.set_status("running", seconds=self.clock.seconds)
        except RunError as error:
            self.progress.say(f"the metrics of this epoch are not written yet: {error.what}")

    def record_resume(self, state: State, steps: int) -> None:
        """Record on which machine the run resumes, and say where."""
        self.record_machine()
        epochs = self.components.recipe.train.epochs
        self.progress.say(
            f"resuming after step {state.epoch * steps + state.step} of {epochs * steps}"
            f" ({state.epoch} of {epochs} epochs are done)"
        )

    def record_machine(self) -> None:
        """Add this machine to the environment of a resumed run."""
        if accelerator().is_main_process:
            self.run_dir.note_machine(machine(), resuming=True)


def training_job(
    components: RunComponents,
    recorder: RunRecorder,
    features: FrozenFeatures | None,
    shared: SharedResources,
    progress: Progress,
) -> Job:
    """Return what ``remap.engine.loop.train`` works on.

    Args:
        features: The student's frozen features of the training images, where they are cached.
    """
    recipe, student, run_dir = components.recipe, components.student, recorder.run_dir
    return Job(
        recipe=recipe,
        student=student,
        objective=components.objective.to(accelerator().device),
        teachers=teachers_in_training(components, shared, progress),
        source=components.training_source,
        accelerator=accelerator(),
        bf16=components.bf16,
        progress=progress,
        data_digest=components.views.digest(progress),
        weights_digest=_weights_digest(components),
        evaluate=recorder.after_epoch,
        on_epoch=recorder.record_epoch,
        on_resume=recorder.record_resume,
        # Both folders belong to the run directory, so that moving it moves them.
        checkpoint=run_dir.checkpoint,
        faults=run_dir.fault,
        labeled=components.labeled_share,
        # None where the whole network has to run.
        features=features,
        sample=method_sample(student, components.views, recipe.seed) if student.attached.wants_sample else None,
    )


def _weights_digest(components: RunComponents) -> str:
    """Which weights the student and its teachers came with, and those of the teachers' heads."""
    digest = hashlib.sha256(components.student.identity.sha256.encode())
    for teacher in components.teachers:
        digest.update(teacher.network.identity.sha256.encode())
        if teacher.spec.model != EMA:  # which changes in training
            add_tensors(digest, {name: gather_full(tensor) for name, tensor in teacher.network.tensors.items()})
    return digest.hexdigest()[:16]


def warn_before_training(components: RunComponents, progress: Progress) -> None:
    """Say what of this run teaches nothing, and what depends on how a batch is divided."""
    losses = [(loss.name, LOSSES.row(loss.name)) for loss in components.recipe.losses]
    on_labels = [name for name, row in losses if row.category == "labels"]
    if on_labels and components.labeled_share == 0.0:
        progress.say(f"{', '.join(on_labels)} teaches nothing: the student learns only from images without labels")
    # A batch that is not divided has no parts to depend on.
    if accelerator().num_processes * components.recipe.train.accumulation == 1:
        return
    if components.student.learns_batch_statistics:
        progress.say("batch statistics are computed within each part of a batch, so results depend on the parts")
    over_batch = [name for name, row in losses if row.over_batch]
    if over_batch:
        size = components.pass_images
        progress.say(
            f"{', '.join(over_batch)}: images are compared within each part of a batch ({size} images), so results "
            "depend on the parts" + ("; with one image there is nothing to compare" if size == 1 else "")
        )
