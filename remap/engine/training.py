"""The live objects of one training (module, optimiser, counters) and their way into a checkpoint and back."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from remap.data.batches import Batch
from remap.data.order import EpochPlan
from remap.distributed.sharding import copy_full_, is_sharded
from remap.engine.average import Average, copy_of
from remap.engine.background import BackgroundWriter
from remap.engine.checkpoint import load_checkpoint, save_checkpoint, snapshot
from remap.engine.job import Job, StudentStep, epoch_plan, require_divisible
from remap.engine.optim import make_optimizer
from remap.engine.selection import best_epoch, kept_epoch
from remap.engine.state import State, digest_of, require_within_plan
from remap.errors import RunError


class Training:
    """Everything that the steps of one job change; ``train``, ``step`` and the recovery functions work on it.

    Attributes:
        state: Counters, as a checkpoint stores them. ``load`` puts another one in its place.
        parameters: All that is trained, by name.
        average: The running average that is the result, where the recipe takes one.
        best: Copies of the student's tensors after the best epoch so far; empty before, and where the last is kept.
        buffers: What training changes besides parameters by the images a process sees: batch statistics, states of
            losses and of averages. As in torch's DistributedDataParallel, all processes use those of the first one.
        stream: Micro-batches from ``state.step`` on; None where they have to be opened (again).
        sharded: Whether each forward pass needs all processes.
        gradients_checked: Whether it is known that a gradient reaches everything that is trained.
        saved_at: When the last checkpoint was begun, in ``time.perf_counter`` seconds.
        writer: Writes checkpoints while training continues.
        reads_late: Whether the host reads the numbers of a step one step later (``remap.engine.late``).
        unread: Numbers (``Pending``) of steps that are done and not counted in ``state``; at most one between steps.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.accelerator, self.spec = job, job.accelerator, job.recipe.train
        digest = digest_of(job.recipe, job.data_digest, job.weights_digest)
        self.state = State(digest, accumulation=self.spec.accumulation)
        self._require_divisible()
        # One module for the whole step, so that compiled blocks and hooks see one forward.
        self.module = StudentStep(job.student, job.objective, bf16=job.bf16).to(self.accelerator.device)
        self.parameters = job.parameters()
        # Projectors of the objective, and what teachers train, go with the student's parameters.
        trained = job.student.trained
        extra = [(name, p) for name, p in self.parameters.items() if name not in trained]
        self.optimizer = make_optimizer(job.student, extra, job.peak_lr, self.spec.weight_decay, self.spec.optimizer)
        self.average: Average | None = None
        self._average: dict[str, Tensor] = {}
        if self.spec.ema is not None:
            self._average = {name: copy_of(tensor) for name, tensor in job.student.tensors.items()}
            pairs = zip(self._average.values(), job.student.tensors.values(), strict=True)
            self.average = Average(list(pairs), self.spec.ema)
        self.best: dict[str, Tensor] = {}
        self.buffers: list[Tensor] = []
        self._buffers_before: list[Tensor] = []
        self.stream: Iterator[Batch] | None = None
        # Sharded passes need every process: no step may be left or done again by one alone.
        self.sharded = any(map(is_sharded, (job.student, *(teacher.network for teacher in job.teachers))))
        self.gradients_checked = False
        self._counted_at = self.saved_at = time.perf_counter()
        self.writer = BackgroundWriter()
        self.reads_late, self.unread = False, list[Any]()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds besides the optimiser and ``best``: what training changes."""
        return self.job.tensors() | {f"ema.{name}": tensor for name, tensor in self._average.items()}

    def as_result(self) -> AbstractContextManager[None]:
        """Give the student the numbers it would have as the result now: those of the average, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    @torch.no_grad()
    def note_best(self) -> None:
        """Copy the student, as the result it would be, where the newest epoch is the best."""
        if self.spec.keep == "best" and best_epoch(self.state.history, self.spec.metric) == self.state.epoch:
            source = self._average or self.job.student.tensors
            self.best = {name: tensor.detach().clone() for name, tensor in source.items()}

    @torch.no_grad()
    def deliver(self) -> None:
        """Give the student the numbers of the result; nothing is trained or saved afterwards."""
        # Empty where the result is the last epoch without an average: the student is that already.
        chosen = self.best if kept_epoch(self.state, self.spec) != self.state.epoch else self._average
        for name, tensor in self.job.student.tensors.items():
            if name in chosen:
                tensor.copy_(chosen[name])
        # Learned words are written into the classifier where this mode ends; a resumed run may never have begun it.
        self.job.student.attached.train()
        self.job.student.model.eval()

    @property
    def plan(self) -> EpochPlan:
        """How steps are cut into micro-batches, as many as memory has needed so far."""
        return epoch_plan(self.job, self.state.accumulation)

    def start_epoch(self) -> None:
        """Prepare for the remaining steps of epoch ``state.epoch``."""
        self.job.student.attached.train()  # the evaluation before left the model in eval mode
        # Opened again at ``state.step``, which going back to a checkpoint may have changed.
        self.stream, tensors = None, self.tensors().values()
        self.buffers = [t for t in tensors if not isinstance(t, (nn.Parameter, DTensor))]
        self.leave_out_time()  # evaluation is not training time

    @torch.no_grad()
    def remember_buffers(self) -> None:
        """Copy the buffers before a step, which may have to be skipped or done again."""
        self._buffers_before = [tensor.clone() for tensor in self.buffers]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the copied values back: the forward pass has changed them already."""
        for tensor, before in zip(self.buffers, self._buffers_before, strict=True):
            tensor.copy_(before)

    def replicated_gradients(self) -> list[Tensor]:
        """Return the gradients that the backward pass has not averaged over processes already (FSDP2's)."""
        gradients = (parameter.grad for parameter in self.parameters.values())
        return [gradient for gradient in gradients if gradient is not None and not isinstance(gradient, DTensor)]

    def count_time(self) -> None:
        """Add the time since the last call, or since the epoch began, to the training time."""
        now = time.perf_counter()
        self.state.seconds, self._counted_at = self.state.seconds + now - self._counted_at, now

    def leave_out_time(self) -> None:
        """Count no time since the last call of ``count_time``."""
        self._counted_at = time.perf_counter()

    def write_checkpoint(self, *, must: bool) -> None:
        """Write a checkpoint of what is trained now; every process calls it.

        Args:
            must: It is on disk afterwards. Otherwise a thread writes a copy while training continues, and a disk that
                refuses is reported.

        Raises:
            RunError: It cannot be written, and it must.
            TrainingError: It, or the one before, holds a number that is not finite.
        """
        job, is_main = self.job, self.accelerator.is_main_process
        assert job.checkpoint is not None
        self.finish_writing()  # so that there is one copy at most
        # Sharded tensors are gathered by all processes together, replicated ones are read by the first alone.
        if not (is_main or any(isinstance(tensor, DTensor) for tensor in self.parameters.values())):
            return
        tensors = snapshot(self.tensors(), self.optimizer, job.student.attached.memory(), self.best)
        if not is_main:
            return
        if must:
            save_checkpoint(job.checkpoint, self.state, tensors)
        else:
            # A copy of the state too: training counts on while the thread writes.
            self.writer.begin(partial(save_checkpoint, job.checkpoint, deepcopy(self.state), tensors))

    def finish_writing(self) -> None:
        """Wait for the checkpoint that is being written, if any, and say why it could not be.

        Raises:
            TrainingError: It holds a number that is not finite.
        """
        error = self.writer.finish()
        if isinstance(error, RunError):
            reason = f"{error.what} ({error.given})" if error.given else error.what
            # The earlier generations are complete, so a full disk does not end training.
            self.job.progress.say(f"no checkpoint was written, the previous one stays: {reason}")
        elif error is not None:
            raise error

    def load(self) -> None:
        """Put the newest complete checkpoint back into the job; every process calls it.

        Raises:
            RunError: There is none, or it does not belong to this run.
        """
        job = self.job
        assert job.checkpoint is not None
        # Steps after the checkpoint are done again: counted now, they would count twice.
        self.unread.clear()
        self.finish_writing()  # the newest one may be on its way to the disk
        self.accelerator.wait_for_everyone()  # all read what the first process has written
        self.state, memory, best = load_checkpoint(
            job.checkpoint, self.state.digest, self.tensors(), self.optimizer, job.progress.say, job.student.tensors
        )
        if self.spec.keep == "best" and best_epoch(self.state.history, self.spec.metric) and not best:
            raise RunError(
                f"the checkpoint in {job.checkpoint} lacks the student of its best epoch",
                do="start the run again in another --output",
            )
        self.best = {}
        for name, tensor in job.student.tensors.items():
            if name in best:
                # Laid out as the student's tensor, which may be sharded.
                self.best[name] = torch.empty_like(tensor, requires_grad=False)
                copy_full_(self.best[name], best[name])
        try:
            job.student.attached.recall(memory)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise RunError(
                f"the checkpoint in {job.checkpoint} does not fit {job.recipe.method.name}",
                given=str(error)[:200],
                do="resume with the versions of the run (its environment.json), or start it again in another --output",
            ) from error
        # On more processes than before, each needs fewer micro-batches for the same memory.
        while self.state.accumulation > self.spec.accumulation and not self._is_divisible():
            self.state.accumulation //= 2
        self._require_divisible()
        require_within_plan(job.checkpoint, self.state, self.spec.epochs, self.plan.steps)

    def _is_divisible(self) -> bool:
        return self.plan.processes * self.plan.accumulation <= self.plan.step_images

    def _require_divisible(self) -> None:
        require_divisible(self.plan.step_images, self.plan.processes, self.plan.accumulation)
