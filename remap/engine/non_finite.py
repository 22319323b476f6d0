"""The rule when a step is not finite: skip it, then halve the rate too, and stop after three, with the images saved.

Where the weights themselves are not finite any more, training goes back to the last checkpoint.
"""

from collections.abc import Iterable

import torch
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor

from remap.data.batches import batches
from remap.distributed.collectives import all_reduce_max
from remap.engine.step import StepResult
from remap.engine.training import Training
from remap.errors import RunError, TrainingError
from remap.io import atomic_write

# Steps that are given up before the run stops, and updates without one after which the earlier ones are forgotten.
MAX_RECOVERIES, FORGET_AFTER = 3, 100


class BrokenWeights(Exception):
    """What is trained is no longer finite; only an earlier checkpoint helps (``go_back``)."""


def skip_step(training: Training, result: StepResult) -> None:
    """Leave out a step that is not finite; from the second one on, also halve the learning rate.

    Every process calls it at the same step, as all functions here.

    Raises:
        BrokenWeights: What is trained is no longer finite.
        TrainingError: There were too many such steps.
    """
    training.restore_buffers()
    _recover(training, result)


def require_finite_weights(training: Training) -> None:
    """Check what is trained before it is evaluated or written: the last update may have overflowed.

    Raises:
        BrokenWeights, TrainingError: As ``skip_step``.
    """
    if not weights_are_finite(training):
        # The state counts the step already that spoiled the weights.
        last = max(0, training.state.step - 1)
        rate = training.optimizer.param_groups[0]["lr"]
        _recover(training, StepResult({}, float("nan"), 0, rate, last, broken_weights=True))


def weights_are_finite(training: Training) -> bool:
    """Whether all that is trained, and the optimiser's moments, are finite on every process."""
    stored = [value for state in training.optimizer.state.values() for value in state.values()]
    moments = [value for value in stored if isinstance(value, Tensor)]
    tensors = (*training.tensors().values(), *moments)
    finite = all_finite([tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors])
    return not any(all_reduce_max(training.accelerator, not finite))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of every floating-point tensor is finite."""
    # Both ends are NaN if any number is: a tenth of the time of torch.isfinite on a CPU.
    ends = [torch.stack(tensor.aminmax()) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    flags = [pair.isfinite().all() for pair in ends]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())  # one transfer


def go_back(training: Training) -> None:
    """Continue from the last checkpoint with the halved learning rate; the updates since then are lost.

    Raises:
        TrainingError: The run writes no checkpoints.
    """
    if training.job.checkpoint is None:
        raise TrainingError("the trained weights are not finite", do=_lower_rate(training))
    # What was learnt about rate and memory stays, or the same would happen again, without end.
    names = ("lr_factor", "recoveries", "last_fault", "skipped", "accumulation")
    kept = {name: getattr(training.state, name) for name in names}
    training.load()
    # No step from here on was begun before the fault was known.
    vars(training.state).update(kept, outrun_fault=0)
    state = training.state
    training.job.progress.say(
        f"back to the checkpoint of epoch {state.epoch + 1}, step {state.step}, "
        f"with the learning rate x {state.lr_factor:g}"
    )


def _recover(training: Training, result: StepResult) -> None:
    state, job = training.state, training.job
    # The next step accumulates into empty gradients, not onto those that overflowed.
    training.optimizer.zero_grad(set_to_none=True)
    update = state.epoch * training.plan.steps + result.step
    # A rare overflow over days is normal; several in a row are not.
    if update >= state.last_fault + FORGET_AFTER:
        state.recoveries = 0
    state.recoveries, state.skipped, state.last_fault = state.recoveries + 1, state.skipped + 1, update + 1
    what = f"{_what_is_not_finite(result)} not finite in epoch {state.epoch + 1}, step {result.step + 1}"
    # The batch is saved for a look at it: the same images may fail again in a new run.
    if state.recoveries > MAX_RECOVERIES:
        saved = _capture(training, result)
        earlier = f"{MAX_RECOVERIES} steps shortly before it were skipped already"
        raise TrainingError(f"{what}; {earlier}", given=_numbers(result), do=_lower_rate(training) + saved)
    # A gradient may overflow without harm to weights; moments that overflowed spoil every later update.
    broken = result.broken_weights or not weights_are_finite(training)
    if state.recoveries > 1 or broken:
        state.lr_factor /= 2
    state.outrun_fault = state.last_fault if state.recoveries > 1 else 0
    halved = f", and the learning rate is halved (now x {state.lr_factor:g})" if state.recoveries > 1 else ""
    job.progress.say(
        f"{what} ({_numbers(result)}): " + ("the weights cannot be used" if broken else f"the step is skipped{halved}")
    )
    if broken:
        raise BrokenWeights


def _what_is_not_finite(result: StepResult) -> str:
    """The first in the order of computation: a bad target makes the loss bad, and that the gradient."""
    if result.broken_weights:
        return "the trained weights are"
    if result.bad_targets:
        return "the teacher's output is"
    return "the gradient is" if all(abs(value) < float("inf") for value in result.losses.values()) else "the loss is"


def _numbers(result: StepResult) -> str:
    numbers = [f"{name} {value:.4g}" for name, value in result.losses.items()]
    numbers += [] if result.broken_weights else [f"gradient norm {result.gradient_norm:.4g}"]
    return ", ".join([*numbers, f"learning rate {result.learning_rate:.3g}"])


def _lower_rate(training: Training) -> str:
    return "in a new run, lower --lr" + (" or set train.precision=fp32" if training.job.bf16 else "")


def _capture(training: Training, result: StepResult) -> str:
    """Write the images of the step for inspection; return where they are, to end a sentence with.

    Each process writes its own part, ``batch-RANK.safetensors``, and the first one ``fault.json``.
    """
    folder, state, source = training.job.faults, training.state, training.job.source
    if folder is None:
        return ""
    rank, stream = training.accelerator.process_index, batches(source, training.plan, state.epoch, result.step)
    try:
        micro_batches = [next(stream) for _ in range(state.accumulation)]
        indices = torch.cat([torch.from_numpy(batch.indices_B) for batch in micro_batches])
        tensors = {
            "images": torch.cat([batch.images_BCHW for batch in micro_batches]).contiguous(),
            "labels": torch.cat([batch.labels_B for batch in micro_batches]),
            "indices": indices,
        }
        atomic_write.make_folder(folder)
        atomic_write.write_bytes(folder / f"batch-{rank}.safetensors", save(tensors))
        if rank == 0:
            fault = {
                "epoch": state.epoch + 1,
                "step": result.step + 1,
                "not_finite": _what_is_not_finite(result),
                "losses": {name: str(value) for name, value in result.losses.items()},  # JSON has no NaN
                "gradient_norm": str(result.gradient_norm),
                "learning_rate": result.learning_rate,
                "images": [source.split.names[index] for index in indices.tolist()],
            }
            atomic_write.write_json(folder / "fault.json", fault)
        where = f"; the images of the step are in {folder}"
    except RunError as error:  # a full disk must not hide the error that stops the run
        where = f"; the images of the step could not be saved: {error.what}"
    training.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has left
    return where
