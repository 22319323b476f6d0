"""A run's directory says at any time how the run stands, and in the end how it ended."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from remap.distributed.device_memory import is_out_of_memory
from remap.distributed.interrupts import watch_signals
from remap.distributed.launch import accelerator, lost_process
from remap.errors import DiskFull, Interrupted, RemapError, TrainingError
from remap.recipe import Recipe
from remap.runs.hardware import machine
from remap.runs.run_dir import RunDir


@dataclass
class RunClock:
    """For how long a run has worked: the parts before it was resumed, and this one.

    Attributes:
        told: What its summary says, once there is one.
    """

    before: float
    started: float = field(default_factory=time.perf_counter)
    told: float | None = None

    @property
    def here(self) -> float:
        return time.perf_counter() - self.started

    @property
    def seconds(self) -> float:
        return self.before + self.here


@contextmanager
def track_status(recipe: Recipe, run_dir: RunDir, resuming: bool) -> Iterator[RunClock]:
    """While the block runs, signals are watched for; afterwards status.json says how it ended.

    Raises:
        RemapError: What the block raised, with how to go on.
    """
    main = accelerator().is_main_process
    clock = RunClock(run_dir.seconds() if resuming else 0.0)
    if main and resuming:
        run_dir.set_status("running", seconds=clock.before)
    elif main:
        run_dir.note_machine(machine(), resuming=False)  # one that goes on does so once it may
    go_on = f"remap {'distill' if recipe.teacher else 'tune'} --resume {shlex.quote(str(run_dir.path))}"
    try:
        with watch_signals(run_dir.stop):
            yield clock
    except Interrupted as error:
        if main:
            _note(run_dir, "stopped", error.what, clock)
        raise Interrupted(
            error.what, exit_code=error.exit_code, do=f"go on with: {go_on}", at_once=error.at_once
        ) from error
    except KeyboardInterrupt:
        if main:
            _note(run_dir, "stopped", "interrupted", clock)
        raise
    except BaseException as error:
        mended = _mendable(error, go_on)
        _note_failure(run_dir, error, str(mended or error), clock)
        if mended is None:
            raise
        raise mended from error
    if main:
        run_dir.set_status("done", seconds=clock.told)


def _note(run_dir: RunDir, status: str, message: str, clock: RunClock) -> None:
    """Record how a run ended, unless the disk that broke it refuses this too."""
    for _ in range(2):  # a second signal may come meanwhile
        try:
            return run_dir.set_status(status, message, clock.seconds)
        except Interrupted:
            continue
        except RemapError:
            return


def _mendable(error: BaseException, go_on: str) -> RemapError | None:
    """The error of a whole run, with what to do about it, for one that says less; None for any other.

    Out of memory comes from before or after training, which itself goes on with smaller steps.
    """
    if isinstance(error, DiskFull):
        return DiskFull(error.what, given=error.given, do=f"free some space; then go on with: {go_on}")
    if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
        return TrainingError(
            "out of memory",
            given=str(error).partition("\n")[0][:200],
            do="use smaller images or models, a smaller --batch-size, or less of data.memory_gib",
        )
    return None


def _note_failure(run_dir: RunDir, error: BaseException, message: str, clock: RunClock) -> None:
    """The process that failed says why; that others lost it is no news."""
    lost = lost_process(error)
    if lost is None:
        _note(run_dir, "failed", message, clock)
    elif accelerator().is_main_process and run_dir.status() == "running":
        _note(run_dir, "failed", str(lost), clock)
