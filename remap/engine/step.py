"""Forward and backward of one step: micro-batches, teachers, losses and gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from remap.data import keyed_random
from remap.data.batches import Batch, batches
from remap.data.views import ViewSource
from remap.distributed.collectives import all_reduce_counts, all_reduce_sum, gather_rows
from remap.distributed.device_memory import is_out_of_memory
from remap.engine.micro_batch import inputs_of, losses_of
from remap.engine.out_of_memory import halve_micro_batches, refuse_sharded
from remap.engine.training import Training
from remap.engine.whole_batch import forward_backward_whole
from remap.errors import DataError, TrainingError


@dataclass
class Sums:
    """What one process adds up over the micro-batches of one step.

    Attributes:
        losses: This process's part of each loss; over all processes they add up to the mean over the global batch.
        bad_targets: For each output of a teacher whether it holds a number that is not finite (0 or 1).
        images: How many images were read.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    bad_targets: list[Tensor] = field(default_factory=list)
    images: int = 0

    def add(self, values: Mapping[str, Tensor], share: float) -> None:
        """Add losses that are means over a share of the step's batch."""
        for name, value in values.items():
            self.losses[name] = self.losses.get(name, 0.0) + value * share


@dataclass(frozen=True)
class StepResult:
    """The numbers of one step, over the global batch.

    Attributes:
        losses: Each loss and their weighted sum.
        gradient_norm: Before clipping.
        bad_targets: Outputs of teachers that are not finite, over all micro-batches and processes.
        learning_rate: Of this step.
        step: Its number in the epoch, from 0.
        broken_weights: Whether the weights themselves were found not finite, after that step.
    """

    losses: Mapping[str, float]
    gradient_norm: float
    bad_targets: int
    learning_rate: float
    step: int
    broken_weights: bool = False

    @property
    def finite(self) -> bool:
        """Whether the optimiser may use the gradients."""
        numbers = (*self.losses.values(), self.gradient_norm)
        # NaN is below nothing, so this finds it as well as infinity.
        return not self.bad_targets and all(abs(number) < float("inf") for number in numbers)


@dataclass(frozen=True)
class Pending:
    """The numbers of a step that a GPU may still be computing; see ``StepResult``.

    Attributes:
        values_N: Losses by the names of ``losses``, bad targets and the gradient norm, on their way to the CPU.
        not_finite: 1.0 where the optimiser may not use the gradients, on the device.
        arrived: Set on a GPU: when ``values_N`` can be read.
    """

    losses: tuple[str, ...]
    values_N: Tensor
    not_finite: Tensor
    arrived: torch.cuda.Event | None
    learning_rate: float
    step: int

    def read(self) -> StepResult:
        """Wait for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        *losses, bad, norm = self.values_N.tolist()
        named = dict(zip(self.losses, losses, strict=True))
        return StepResult(named, norm, int(bad), self.learning_rate, self.step)


def forward_backward(training: Training, update: int) -> Sums:
    """Accumulate the gradients of one step over this process's micro-batches, in smaller ones if memory runs out.

    Every process calls it at the same step.

    Args:
        update: Number of the step over the whole run, from 0.

    Raises:
        DataError: No image of the step can be read.
        TrainingError: Memory does not suffice for one image, or no gradient reaches a trained parameter.
    """
    seed = keyed_random.step_seed(training.job.recipe.seed, training.state.epoch, update)
    while True:
        # Keyed by the step, so that a step that is done again, here or after a resume, draws the same numbers.
        torch.manual_seed(seed + training.accelerator.process_index)
        training.remember_buffers()
        if training.spec.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # what graphs gave in the step before may be overwritten
        sums, out_of_memory = Sums(), ""
        try:
            _accumulate(training, sums)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if training.sharded:
                raise refuse_sharded(error) from error
            out_of_memory = str(error)  # only the text: the error itself keeps the tensors of the step alive
        # All processes do the step again if one ran out: gradients of other sizes do not add up.
        failed, images = all_reduce_counts(training.accelerator, bool(out_of_memory), sums.images)
        if failed:
            training.restore_buffers()
            halve_micro_batches(training, out_of_memory)
        elif not images:
            _refuse_unreadable(training)
        else:
            _require_gradients(training, sums)
            if images < training.plan.step_images and not _compares_micro_batches(training):
                _leave_out_unreadable(training, sums, training.plan.step_images / images)
            return sums


def gather_result(training: Training, sums: Sums, gradient_norm: Tensor, learning_rate: float) -> Pending:
    """Add up the losses of all processes; every process calls it and gets the same result."""
    device = gradient_norm.device
    bad_targets = torch.stack(sums.bad_targets).sum() if sums.bad_targets else torch.zeros((), device=device)
    values = all_reduce_sum(training.accelerator, torch.stack([*sums.losses.values(), bad_targets]))
    # One transfer from the device for all of them: each one would wait for the step's kernels.
    values = torch.cat([values, gradient_norm[None]])
    not_finite = (~torch.isfinite(values).all() | (values[-2] > 0)).float()
    arrived = torch.cuda.Event() if device.type == "cuda" else None
    values = values.to("cpu", non_blocking=True)  # into pinned memory
    if arrived is not None:
        arrived.record()
    return Pending(tuple(sums.losses), values, not_finite, arrived, learning_rate, training.state.step)


def _accumulate(training: Training, sums: Sums) -> None:
    """Run the micro-batches of a step. One without a readable image counts nothing, as unreadable images do."""
    job, state = training.job, training.state
    if training.stream is None:
        # Frozen features stand in for the source: ``batches`` uses ``split`` and ``batch`` only, which they have too.
        source = cast(ViewSource, job.features or job.source)
        training.stream = batches(source, training.plan, state.epoch, state.step)
    # The next one is decoded by a thread while this one trains.
    read = (next(training.stream) for _ in range(state.accumulation))
    readable = (batch for batch in read if len(batch.indices_B))
    if _compares_micro_batches(training):
        _accumulate_whole(training, list(readable), sums)
        return
    for batch in readable:
        sums.images += len(batch.indices_B)
        loss, parts = _forward(training, batch, sums.bad_targets)
        # Gradients are averaged over processes afterwards; shares are those of the global batch.
        (loss * (batch.share * training.accelerator.num_processes)).backward()
        sums.add({"loss": loss.detach(), **parts}, batch.share)
    if not sums.images:
        _contribute_nothing(training, sums)


def _compares_micro_batches(training: Training) -> bool:
    """Whether a loss compares all images of a step, and they are in several micro-batches."""
    state, over_batch = training.state, training.job.objective.over_batch
    return bool(over_batch) and state.accumulation * training.accelerator.num_processes > 1


def _leave_out_unreadable(training: Training, sums: Sums, factor: float) -> None:
    """Make sums over the step's batch means over its readable images, of which there are 1 / ``factor`` of all."""
    for gradient in (p.grad for p in training.parameters.values() if p.grad is not None):
        gradient.mul_(factor)
    sums.losses = {name: value * factor for name, value in sums.losses.items()}


def _forward(training: Training, batch: Batch, bad_targets: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run teachers and student on one micro-batch; return the mean loss and each of its terms."""
    return losses_of(training, inputs_of(training, batch, bad_targets))


def _accumulate_whole(training: Training, batches: list[Batch], sums: Sums) -> None:
    """Run the micro-batches of a step whose losses compare all of its images.

    Raises:
        DataError: A process can read no image of the step: the others need its part.
    """
    sums.images = sum(len(batch.indices_B) for batch in batches)
    images = gather_rows(training.accelerator, torch.tensor([sums.images], device=training.accelerator.device)).tolist()
    if not all(images):  # on all processes at once, or the others would wait for its part
        _refuse_unreadable(training)
    first_row = sum(images[: training.accelerator.process_index])
    # Of the images that can be read: the loss over all of them is their mean.
    batches = [replace(batch, share=len(batch.indices_B) / sum(images)) for batch in batches]
    _name_losses(training, sums)  # in the same order on all processes
    for values, share in forward_backward_whole(training, batches, first_row, sums.bad_targets):
        sums.add(values, share)


def _contribute_nothing(training: Training, sums: Sums) -> None:
    """Take part in a step of which this process can read no image: the others wait for its gradients."""
    if training.sharded:  # the others need this process in their forward pass, which it cannot run
        _refuse_unreadable(training)
    for parameter in training.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    _name_losses(training, sums)


def _name_losses(training: Training, sums: Sums) -> None:
    """Begin the sums with zeros: all processes need the same names in the same order."""
    penalized = training.job.student.attached.penalty() is not None
    names = ("loss", *training.job.objective.terms, *(("penalty",) if penalized else ()))
    sums.losses = dict.fromkeys(names, torch.zeros((), device=training.accelerator.device))


def _refuse_unreadable(training: Training) -> None:
    bad = training.job.source.bad_names()
    raise DataError(
        f"no image of step {training.state.step + 1} can be read; {len(bad)} could not be read so far",
        given="; ".join(f"{name} ({reason})" for name, reason in bad[-3:]),
        do="check that the images are still there, then continue with --resume",
    )


def _require_gradients(training: Training, sums: Sums) -> None:
    """Check in the first step that the loss reaches all that is trained: the rest would stay as it was drawn."""
    if training.gradients_checked or not sums.images:
        return
    training.gradients_checked = True
    missing = [name for name, parameter in training.parameters.items() if parameter.grad is None]
    if missing:
        raise TrainingError(
            f"no loss reaches {len(missing)} of {len(training.parameters)} trained parameters; nothing was stepped",
            given=", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
            do="add a loss that reads what they change (ce and kd read the classifier), or take another method",
        )
