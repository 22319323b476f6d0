"""When a checkpoint is written: by time, by a signal, by a callback that raised, and at the end."""

import time

from remap.distributed.collectives import all_reduce_max
from remap.distributed.interrupts import CALLBACK, requested_signal, signal_exit_code, signal_name
from remap.engine.non_finite import require_finite_weights
from remap.engine.training import Training
from remap.errors import Interrupted, is_at_once


def save(training: Training, *, must: bool = False) -> None:
    """Write a checkpoint, if the run has a folder for them; where it ``must`` be there, before training continues."""
    if training.job.checkpoint is not None:
        training.count_time()
        training.saved_at = time.perf_counter()
        require_finite_weights(training)  # a checkpoint is what a run with broken weights goes back to
        training.write_checkpoint(must=must)


def save_if_due(training: Training, raised: Exception | None) -> None:
    """Write a checkpoint if enough time has passed; also if a signal came or a callback raised, and end the run then.

    Raises:
        Interrupted: A signal came, or a callback raised on another process.
    """
    accelerator, due = training.accelerator, is_due(training)
    if training.writer.is_done:
        training.finish_writing()  # says at once what went wrong
    # Each process has its own clock and its own signals, and all have to do the same.
    stop, any_due = all_reduce_max(accelerator, CALLBACK if raised else requested_signal(accelerator), due)
    if training.unread:
        return  # a signal came just now, or the clock ran out: the next step is counted at once
    if stop or any_due:
        save_or_end(training, stop, raised)


def save_or_end(training: Training, stop: int, raised: Exception | None) -> None:
    """Write a checkpoint; end the run then if a signal came or a callback raised, whose error counts more than others.

    Raises:
        Interrupted, RunError, Exception: As ``save_if_due``; a state that cannot be saved; what the callback raised.
    """
    try:
        save(training, must=bool(stop))
    except Exception as error:
        if raised is None or is_at_once(error):
            raise
        raised.add_note(f"and the state was not saved: {error}")
    end_if(training, stop, raised)


def is_due(training: Training) -> bool:
    """Return whether it is time for a checkpoint."""
    return time.perf_counter() - training.saved_at > training.spec.checkpoint_seconds


def is_wanted(training: Training) -> bool:
    """Return whether ``save_if_due`` is about to write one; a process that is alone knows."""
    return is_due(training) or bool(requested_signal(training.accelerator))


def end_if(training: Training, stop: int, raised: Exception | None) -> None:
    """Leave training, all processes together; the state is saved."""
    if stop:
        training.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has left
        if raised is not None:
            raise raised
        raise Interrupted(f"stopped by {signal_name(stop)}; the state is saved", exit_code=signal_exit_code(stop))
