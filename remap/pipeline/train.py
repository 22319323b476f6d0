"""The work of one run: train the assembled student, watch over what must hold, write what is kept."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from torch.nn import Parameter

from remap.backbones.build import add_tensors
from remap.cache.frozen_features import FrozenFeatures
from remap.data.views import ViewSource
from remap.distributed.collectives import share_unreadable
from remap.distributed.launch import accelerator
from remap.distributed.sharding import gather_full
from remap.engine.checkpoint import State, has_checkpoint
from remap.engine.evaluate import Evaluation, evaluate_as
from remap.engine.job import Job, bytes_of_a_run, parameters_of
from remap.engine.loop import fit
from remap.errors import RunError
from remap.io import atomic_write
from remap.network import Network
from remap.pipeline.assemble import RunComponents, assemble, features_in_training, images_at_once, listed, sample_for
from remap.pipeline.frozen_check import Frozen, trainables
from remap.pipeline.run_status import RunClock
from remap.pipeline.shared import SharedResources
from remap.pipeline.summary import summarize
from remap.pipeline.teacher_outputs import teachers_in_training
from remap.pipeline.teachers import require_useful
from remap.progress import Progress
from remap.recipe import Recipe
from remap.recipe.schema import EMA
from remap.remapping import LOSSES
from remap.runs.hardware import machine
from remap.runs.run_dir import RunDir
from remap.runs.task import save_task


def carry_out(
    recipe: Recipe, run_dir: RunDir, progress: Progress, bench: SharedResources, clock: RunClock, *, resuming: bool
) -> tuple[dict[str, Any], Network]:
    """Train and write everything that a run leaves.

    Returns:
        What summary.json says, and the tuned student.
    """
    if resuming and (run_dir.path / "metrics.jsonl").is_file() and not has_checkpoint(run_dir.checkpoint):
        raise RunError(
            f"the checkpoints of {run_dir.path} are gone; it had been trained for {len(run_dir.metrics())} epochs",
            do=f"bring {run_dir.checkpoint} back, or start the run again in another --output",
        )
    work = _Work(assemble(recipe, run_dir, progress, bench), run_dir, progress, clock)
    if resuming and not has_checkpoint(run_dir.checkpoint):
        work.note_machine()  # which may have prepared a teacher
    work.say_what_to_expect()
    work.features = features_in_training(work.parts, progress)
    initial = work.evaluate(work.parts.views.val, "the untrained student")
    for teacher in work.parts.teachers:
        require_useful(teacher, initial, work.parts.views.val)
    state, fitting, frozen = work.train(bench, resuming)
    summary = work.summarize(initial, state, frozen)
    if accelerator().is_main_process:
        work.write(summary, state, fitting)
    accelerator().wait_for_everyone()
    return summary, work.parts.student


class _Work:
    """What the steps of ``carry_out`` share."""

    def __init__(self, parts: RunComponents, run_dir: RunDir, progress: Progress, clock: RunClock) -> None:
        self.parts, self.recipe, self.student = parts, parts.recipe, parts.student
        self.run_dir, self.progress, self.clock = run_dir, progress, clock
        self.features: dict[str, FrozenFeatures] = {}
        self.last: Evaluation | None = None  # of the student, after an epoch

    @cached_property
    def trained(self) -> dict[str, Parameter]:
        """Of the student and of the losses."""
        return parameters_of(self.student, self.parts.objective)

    def note_machine(self) -> None:
        """Where a run goes on, once something of it is made here."""
        if accelerator().is_main_process:
            self.run_dir.note_machine(machine(), resuming=True)

    def say_what_to_expect(self) -> None:
        parts = self.parts
        idle = [loss.name for loss in self.recipe.losses if LOSSES.row(loss.name).category == "labels"]
        if idle and parts.labeled_share == 0.0:
            self.progress.say(f"{', '.join(idle)} teaches nothing: the student learns from images without labels only")
        count = accelerator().num_processes * self.recipe.train.accumulation
        if count == 1:
            return
        if self.student.learns_batch_statistics:
            self.progress.say(
                "batch statistics are those of each process's own part of a batch, so results depend on the parts"
            )
        comparing = [loss.name for loss in self.recipe.losses if LOSSES.row(loss.name).over_batch]
        if comparing:
            size = images_at_once(parts)
            self.progress.say(
                f"{', '.join(comparing)}: images are compared within each part of a batch, of {size}, so results "
                "depend on the parts" + ("; of one image there is nothing to compare" if size == 1 else "")
            )

    def evaluate(self, source: ViewSource, what: str) -> Evaluation:
        kept = self.features.get("val") if source is self.parts.views.val else None
        return evaluate_as(self.recipe, self.student, source, accelerator(), self.progress, what, kept)

    def train(self, bench: SharedResources, resuming: bool) -> tuple[State, float, dict[str, Any]]:
        """Fit the student.

        Returns:
            Where training ended, the seconds that took here, and the proof that nothing frozen has changed.
        """
        job = self._job(bench)
        frozen = Frozen.of(self.student)
        if accelerator().is_main_process:
            written = sum(path.stat().st_size for path in self.run_dir.checkpoint.glob("*"))
            missing = max(0, bytes_of_a_run(job.student, job.objective, job.teachers) - written)
            atomic_write.require_space(self.run_dir.path, missing, "its checkpoints and the tuned student")
            self.run_dir.write_trainables(trainables(self.trained))
        count = sum(parameter.numel() for parameter in self.trained.values())
        own = count - self.student.num_trainable
        self.progress.say(
            f"training {len(self.trained)} tensors, {count:,} parameters"
            + (f", {own:,} of them in the losses" if own else "")
            + f" ({self.run_dir.trainables}); {frozen}"
        )
        begun = self.clock.here
        try:
            state = fit(job, resume=resuming)
        finally:
            for teacher in job.teachers:
                teacher.close()  # other runs may share the network
        fitting = self.clock.here - begun
        self.student.model.eval()
        return state, fitting, frozen.require_unchanged(self.student)

    def _job(self, bench: SharedResources) -> Job:
        parts = self.parts
        return Job(
            recipe=self.recipe,
            student=self.student,
            objective=parts.objective.to(accelerator().device),
            teachers=teachers_in_training(parts, bench, self.progress),
            source=parts.lessons,
            accelerator=accelerator(),
            bf16=parts.bf16,
            progress=self.progress,
            data_digest=parts.views.digest(self.progress),
            weights_digest=_weights_digest(parts),
            evaluate=self._after_epoch,
            on_epoch=self._record,
            on_resume=self._go_on,
            checkpoint=self.run_dir.checkpoint,
            faults=self.run_dir.fault,
            labeled=parts.labeled_share,
            features=self.features.get("train"),
            sample=sample_for(parts) if self.student.attached.wants_sample else None,
        )

    def _go_on(self, state: State, steps: int) -> None:
        self.note_machine()
        epochs = self.recipe.train.epochs
        self.progress.say(
            f"going on after step {state.epoch * steps + state.step} of {epochs * steps}"
            f" ({state.epoch} of {epochs} epochs are done)"
        )

    def _after_epoch(self) -> dict[str, float]:
        self._share_bad()
        self.parts.views.require_few_bad(self.recipe.data.max_bad)
        self.last = self.evaluate(self.parts.views.val, "the student")
        return {"accuracy": self.last.accuracy}

    def _share_bad(self) -> None:
        """Each process has found the unreadable images of its own share."""
        for source in (self.parts.views.train, self.parts.views.unlabeled):
            if source is not None:
                share_unreadable(accelerator(), source)

    def _record(self, history: Sequence[dict[str, Any]]) -> None:
        try:
            self.run_dir.write_metrics(history)
            self.run_dir.set_status("running", seconds=self.clock.seconds)
        except RunError as error:  # written anew after the next epoch, and at the end
            self.progress.say(f"the metrics of this epoch are not written yet: {error.what}")

    def summarize(self, initial: Evaluation, state: State, frozen: dict[str, Any]) -> dict[str, Any]:
        parts = self.parts
        for number, prepared in enumerate(parts.teachers):
            if prepared.spec.model == EMA:
                average = evaluate_as(
                    self.recipe, prepared.network, parts.views.val, accelerator(), self.progress, "the average"
                )
                parts.teachers[number] = replace(prepared, accuracy=average.accuracy)
        bad = parts.lessons.bad_names()
        if bad:
            self.progress.say(f"skipped {len(bad)} training image(s) that cannot be read: {listed(bad)}")
        final = self.last or self.evaluate(parts.views.val, "the student")  # there was no epoch left to train
        summary = summarize(parts, self.run_dir, initial, final, state)
        summary["frozen"], summary["trainables"] = frozen, list(self.trained)
        if parts.views.test is not None:
            summary["student"]["test_accuracy"] = self.evaluate(parts.views.test, "the test split").accuracy
        return summary

    def write(self, summary: dict[str, Any], state: State, fitting: float) -> None:
        """The metrics, the task and the summary, whose last entries are made here."""
        method, run_dir = self.recipe.method, self.run_dir
        patience = 3600.0 if accelerator().num_processes == 1 else 300.0  # the others wait
        keep = partial(atomic_write.once_there_is_room, seconds=patience, say=self.progress.say)
        keep(lambda: run_dir.write_metrics(state.history))
        summary["student"]["task_bytes"] = keep(
            lambda: save_task(run_dir.task, self.student, self.parts.views.view, method.name, method.options)
        )
        known = self.clock.here - fitting + state.seconds  # a part that was killed noted less than its checkpoint knows
        summary["seconds"] = self.clock.told = round(max(self.clock.seconds, known), 2)
        keep(lambda: run_dir.write_summary(summary))


def _weights_digest(parts: RunComponents) -> str:
    """Which weights the student and its teachers came with, and those of the teachers' heads."""
    digest = hashlib.sha256(parts.student.identity.sha256.encode())
    for teacher in parts.teachers:
        digest.update(teacher.network.identity.sha256.encode())
        if teacher.spec.model != EMA:  # which changes in training
            add_tensors(digest, {name: gather_full(tensor) for name, tensor in teacher.network.tensors.items()})
    return digest.hexdigest()[:16]
