"""The rule when a step runs out of memory: do it again in twice as many micro-batches of half the size."""

from accelerate.utils.memory import clear_device_cache

from remap.engine.training import Training
from remap.errors import TrainingError
from remap.io.human_size import number_of

MAX_HALVINGS = 3


def halve_micro_batches(training: Training, error: str) -> None:
    """Halve the micro-batches from now on: their sums stay the same. Every process calls it at the same step.

    Args:
        error: The message on this process; empty where another one ran out of memory.

    Raises:
        TrainingError: They cannot become smaller.
    """
    state, plan = training.state, training.plan
    # The part of the step that fitted is done again as well.
    training.optimizer.zero_grad(set_to_none=True)  # part of the step was done already
    training.stream = None  # it is cut in the old size
    # Fragments of the failed step would make the smaller one fail too.
    clear_device_cache(garbage_collection=True)
    count = plan.processes * state.accumulation * 2
    if state.accumulation >= training.spec.accumulation * 2**MAX_HALVINGS or plan.step_images < count:
        raise TrainingError(
            f"out of memory, even with {state.accumulation} micro-batches per step",
            given=error.partition("\n")[0][:200] or "reported by another process",
            do="use smaller images or models, a smaller --batch-size, or train.precision=bf16, in a new run",
        )
    state.accumulation *= 2
    training.job.progress.say(
        f"out of memory: from now on {state.accumulation} micro-batches per step, of up to "
        f"{number_of(-(-plan.step_images // count), 'image')}; {_what_changes(training)}"
    )


def refuse_sharded(error: Exception) -> TrainingError:
    """Return the error for a step with sharded weights, which cannot be done again.

    The other processes are in the middle of a pass and wait for this one's part of a weight.
    """
    return TrainingError(
        "out of memory, and a step with sharded weights cannot be done again in smaller parts",
        given=str(error).strip().partition("\n")[0][:200] or type(error).__name__,
        do="start again with train.accumulation doubled, or with smaller images or models",
    )


def _what_changes(training: Training) -> str:
    changes = training.job.student.learns_batch_statistics
    return "that changes batch statistics" if changes else "the sum over a step stays the same"
