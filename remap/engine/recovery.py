"""How training goes on after a step that went wrong, and when it does not."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.distributed.tensor import DTensor

from remap.data.batches import batches
from remap.distributed.collectives import all_reduce_max
from remap.engine.faults import BrokenWeights, Fault, all_finite, capture
from remap.errors import RunError, TrainingError
from remap.remapping import LOSSES

if TYPE_CHECKING:
    from remap.engine.loop import Loop

# Faulty steps before the run stops, and updates without one after which those before are forgotten.
RECOVERIES, FORGET_AFTER = 3, 100
# Times that micro-batches are halved.
HALVINGS = 3


class Recovery:
    """What becomes of a ``Loop`` whose step was not finite, or did not fit into memory.

    Every process calls its methods at the same step.
    """

    def __init__(self, loop: "Loop") -> None:
        self.loop = loop

    def from_fault(self, fault: Fault) -> None:
        """Skip the step; later ones also halve the learning rate, and the last one stops the run.

        Raises:
            BrokenWeights: What is trained is no longer finite: only a checkpoint helps.
            TrainingError: There were too many.
        """
        state, job = self.loop.state, self.loop.job
        self.loop.optimizer.zero_grad(set_to_none=True)
        update = state.epoch * self.loop.plan.steps + fault.step
        if update >= state.last_fault + FORGET_AFTER:
            state.recoveries = 0
        state.recoveries, state.skipped, state.last_fault = state.recoveries + 1, state.skipped + 1, update + 1
        where = f"{fault.what} not finite in epoch {state.epoch + 1}, step {fault.step + 1}"
        if state.recoveries > RECOVERIES:
            kept = self._capture(fault)
            earlier = f"{RECOVERIES} steps shortly before it were given up already"
            raise TrainingError(f"{where}; {earlier}", given=str(fault), do=self._slower() + kept)
        broken = fault.broken or not self.is_whole()
        if state.recoveries > 1 or broken:
            state.lr_factor /= 2
        slower = f", and the learning rate is halved (now x {state.lr_factor:g})" if state.recoveries > 1 else ""
        job.progress.say(
            f"{where} ({fault}): " + ("the weights cannot be used" if broken else f"the step is skipped{slower}")
        )
        if broken:
            raise BrokenWeights

    def require_whole(self) -> None:
        """Before weights are evaluated or written: those of an update that went wrong must not be.

        Raises:
            BrokenWeights, TrainingError: As ``from_fault``.
        """
        if not self.is_whole():
            step = max(0, self.loop.state.step - 1)  # the last one that was stepped
            rate = self.loop.optimizer.param_groups[0]["lr"]
            self.from_fault(Fault({}, float("nan"), 0, rate, step, broken=True))

    def is_whole(self) -> bool:
        """Whether all that is trained, and the optimiser's moments, are finite."""
        loop = self.loop
        moments = [value for state in loop.optimizer.state.values() for value in state.values()]
        whole = all_finite([_local(value) for value in (*loop.job.tensors().values(), *moments)])
        return not any(all_reduce_max(loop.accelerator, not whole))

    def _slower(self) -> str:
        return "in a new run, lower --lr" + (" or set train.precision=fp32" if self.loop.job.bf16 else "")

    def _capture(self, fault: Fault) -> str:
        """Keep the images of the step; gives what to tell of them."""
        loop, folder = self.loop, self.loop.job.faults
        if folder is None:
            return ""
        state, source = loop.state, loop.job.source
        stream = batches(source, loop.plan, state.epoch, fault.step)
        told = {
            "epoch": state.epoch + 1,
            "step": fault.step + 1,
            "not_finite": fault.what,
            "losses": {name: str(value) for name, value in fault.losses.items()},
            "gradient_norm": str(fault.norm),
            "learning_rate": fault.rate,
        }
        try:
            parts = [next(stream) for _ in range(state.accumulation)]
            capture(folder, loop.accelerator.process_index, parts, source.split.names, told)
            kept = f"; the images of the step are in {folder}"
        except RunError as error:  # a full disk must not hide what went wrong before
            kept = f"; the images of the step could not be kept: {error.what}"
        loop.accelerator.wait_for_everyone()
        return kept

    def from_lack_of_memory(self, why: str) -> None:
        """Cut micro-batches in two: twice as many, each of half the images, add up to the same.

        Args:
            why: What memory said on this process; empty where another one ran out.

        Raises:
            TrainingError: They cannot become smaller.
        """
        loop, state, spec = self.loop, self.loop.state, self.loop.spec
        loop.optimizer.zero_grad(set_to_none=True)
        loop.stream = None
        clear_device_cache(garbage_collection=True)
        count = loop.accelerator.num_processes * state.accumulation * 2
        if state.accumulation >= spec.accumulation * 2**HALVINGS or loop.plan.step_images < count:
            raise TrainingError(
                f"out of memory, even with {state.accumulation} micro-batches to a step",
                given=why.partition("\n")[0][:200] or "told by another process",
                do="use smaller images or models, a smaller --batch-size, or train.precision=bf16, in a new run",
            )
        state.accumulation *= 2
        loop.job.progress.say(
            f"out of memory: {state.accumulation} micro-batches to a step from now on, of up to "
            f"{-(-loop.plan.step_images // count)} image(s); {self._what_changes()}"
        )

    def _what_changes(self) -> str:
        job = self.loop.job
        parts = ["batch statistics"] if job.student.learns_batch_statistics else []
        parts += [loss.name for loss in job.recipe.losses if LOSSES.row(loss.name).over_batch]
        return f"that changes {', '.join(parts)}" if parts else "what a step adds up to stays the same"

    def go_back(self) -> None:
        """Start again from the last checkpoint, with half the learning rate: what came after it is lost."""
        loop = self.loop
        kept = ("lr_factor", "recoveries", "last_fault", "skipped", "accumulation")
        now = {name: getattr(loop.state, name) for name in kept}
        if loop.job.checkpoint is None:
            raise TrainingError("the trained weights hold numbers that are not finite", do=self._slower())
        loop.load()
        for name, value in now.items():
            setattr(loop.state, name, value)
        loop.job.progress.say(
            f"back to the checkpoint of epoch {loop.state.epoch + 1}, step {loop.state.step}, "
            f"with the learning rate x {loop.state.lr_factor:g}"
        )


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Buffers:
    """Buffers that training changes by the images a process sees (batch statistics, states of losses, of averages).

    They are those of the first process everywhere, as in torch's DistributedDataParallel.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = [t for t in tensors.values() if not isinstance(t, (torch.nn.Parameter, DTensor))]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Before a step that may have to be done again."""
        self._before = [tensor.clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, before in zip(self.tensors, self._before, strict=True):
            tensor.copy_(before)
