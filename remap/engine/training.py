"""The live objects of one training (module, optimiser, counters) and their way into a checkpoint and back."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from remap.data.batches import Batch
from remap.data.order import EpochPlan
from remap.distributed.sharding import is_sharded
from remap.engine.checkpoint import load_checkpoint, save_checkpoint, snapshot
from remap.engine.job import Job, StudentStep, epoch_plan, require_divisible
from remap.engine.optim import adamw
from remap.engine.state import State, digest_of, require_within_plan
from remap.errors import RunError


class Training:
    """Everything that the steps of one job change; ``train``, ``step`` and the recovery functions work on it.

    Attributes:
        state: Counters, as a checkpoint stores them. ``load`` puts another one in its place.
        parameters: All that is trained, by name.
        buffers: What training changes besides parameters by the images a process sees: batch statistics, states of
            losses and of averages. As in torch's DistributedDataParallel, all processes use those of the first one.
        stream: Micro-batches from ``state.step`` on; None where they have to be opened (again).
        sharded: Whether each forward pass needs all processes.
        gradients_checked: Whether it is known that a gradient reaches everything that is trained.
        saved_at: When the last checkpoint was begun, in ``time.perf_counter`` seconds.
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
        extra = [(name, p) for name, p in self.parameters.items() if name not in job.student.trained]
        self.optimizer = adamw(job.student, extra, job.peak_lr, self.spec.weight_decay)
        self.buffers: list[Tensor] = []
        self._buffers_before: list[Tensor] = []
        self.stream: Iterator[Batch] | None = None
        # Sharded passes need every process: no step may be left or done again by one alone.
        self.sharded = any(map(is_sharded, (job.student, *(teacher.network for teacher in job.teachers))))
        self.gradients_checked = False
        self._counted_at = self.saved_at = time.perf_counter()

    @property
    def plan(self) -> EpochPlan:
        """How steps are cut into micro-batches, as many as memory has needed so far."""
        return epoch_plan(self.job, self.state.accumulation)

    def start_epoch(self) -> None:
        """Prepare for the remaining steps of epoch ``state.epoch``."""
        self.job.student.attached.train()  # the evaluation before left the model in eval mode
        self.stream, tensors = None, self.job.tensors().values()
        self.buffers = [t for t in tensors if not isinstance(t, (nn.Parameter, DTensor))]
        self._counted_at = time.perf_counter()  # evaluation is not training time

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

    def write_checkpoint(self, *, must: bool) -> None:
        """Write a checkpoint; every process calls it.

        Args:
            must: Raise where it cannot be written. Otherwise a full disk is reported and training continues.

        Raises:
            RunError: It cannot be written, and it must.
        """
        job, is_main = self.job, self.accelerator.is_main_process
        assert job.checkpoint is not None
        # Sharded tensors are gathered by all processes together, replicated ones are read by the first alone.
        if not (is_main or any(isinstance(tensor, DTensor) for tensor in self.parameters.values())):
            return
        tensors = snapshot(job.tensors(), self.optimizer, job.student.attached.memory())
        if not is_main:
            return
        try:
            save_checkpoint(job.checkpoint, self.state, tensors)
        except RunError as error:
            if must:
                raise
            job.progress.say(f"no checkpoint was written, the previous one stays: {error.what} ({error.given})")

    def load(self) -> None:
        """Put the newest complete checkpoint back into the job; every process calls it.

        Raises:
            RunError: There is none, or it does not belong to this run.
        """
        job = self.job
        assert job.checkpoint is not None
        self.state, memory = load_checkpoint(
            job.checkpoint, self.state.digest, job.tensors(), self.optimizer, job.progress.say
        )
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
