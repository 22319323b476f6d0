"""Write run status (running, done, failed, stopped) to status.json."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from remap.distributed.device_memory import is_out_of_memory
from remap.distributed.interrupts import watch_signals
from remap.distributed.launch import accelerator, lost_process
from remap.errors import (
    MORE_THREADS,
    DiskFull,
    Interrupted,
    MissingData,
    RemapError,
    ThreadRefused,
    TrainingError,
    refused_thread,
)
from remap.io.checked_json import read_run_json
from remap.runs.hardware import machine
from remap.runs.run_dir import RunDir


@dataclass
class RunClock:
    """Working time of a run over all its parts.

    Attributes:
        earlier: Seconds of the parts before this one.
        reported: Seconds as its summary reports them, once there is one.
        ended_by: What a callback raised.
    """

    earlier: float
    started: float = field(default_factory=time.perf_counter)
    reported: float | None = None
    ended_by: Exception | None = None

    @property
    def here(self) -> float:
        """Seconds of this part."""
        return time.perf_counter() - self.started

    @property
    def seconds(self) -> float:
        """Seconds of all parts."""
        return self.earlier + self.here


@contextmanager
def track_status(run_dir: RunDir, resuming: bool) -> Iterator[RunClock]:
    """Watch for signals while the block runs, and record in status.json how it ended.

    Raises:
        RemapError: What the block raised, with the command that resumes the run.
    """
    main = accelerator().is_main_process
    # Time of earlier parts counts: the summary reports the whole run.
    clock = RunClock(run_dir.seconds() if resuming else 0.0)
    before = _recorded(run_dir) if resuming else None
    if main and resuming:
        run_dir.set_status("running", seconds=clock.earlier)
    elif main:
        # A resumed run adds its machine later: only once its checkpoint turned out to be usable.
        run_dir.note_machine(machine(), resuming=False)
    resume = run_dir.resume_command()
    try:
        with watch_signals(run_dir.stop):
            yield clock
    except Interrupted as error:
        if main:
            _record(run_dir, "stopped", error.what, clock)
        do = f"resume with: {resume}"
        raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error
    except KeyboardInterrupt:  # where Ctrl-C had Python's own handler before, as in a program that calls remap
        if main:
            _record(run_dir, "stopped", "interrupted", clock)
        raise
    except BaseException as error:  # of any kind: a run that has ended must not be left as running
        if error is clock.ended_by:
            if main:
                _record(run_dir, "stopped", f"by a callback: {error!r}", clock)
            raise
        explained = _explained(error, resume)
        _record_failure(run_dir, error, str(explained or error), clock, before)
        if explained is None:
            raise
        raise explained from error
    if main:
        run_dir.set_status("done", seconds=clock.reported or 0.0)


def _recorded(run_dir: RunDir) -> tuple[str, str] | None:
    """Return status and message of a run; None where its status.json is missing or damaged."""
    try:
        found = read_run_json(run_dir.path / "status.json")
    except RemapError:
        return None
    return (str(found.get("status", "")), str(found.get("message", ""))) if isinstance(found, dict) else None


def _record(run_dir: RunDir, status: str, message: str, clock: RunClock) -> None:
    """Record how a run ended, unless the disk that broke it refuses this too."""
    for _ in range(2):  # a second signal may arrive while the file is written
        try:
            return run_dir.set_status(status, message, clock.seconds)
        except Interrupted:
            continue
        except RemapError:
            return


def _explained(error: BaseException, resume: str) -> RemapError | None:
    """Return the error with what to do about it where it does not say so itself; None for any other error.

    Out of memory comes from before or after training, which itself continues with smaller steps.
    """
    if isinstance(error, DiskFull):
        return DiskFull(error.what, given=error.given, do=f"free some space; then resume with: {resume}")
    refused = error if isinstance(error, ThreadRefused) else refused_thread(error)
    if refused is not None:
        return ThreadRefused(refused.what, do=f"{MORE_THREADS}; then resume with: {resume}")
    if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
        return TrainingError(
            "out of memory",
            given=str(error).strip().partition("\n")[0][:200] or type(error).__name__,
            do="use smaller images or models, a smaller --batch-size, or less of data.memory_gib",
        )
    return None


def _record_failure(
    run_dir: RunDir, error: BaseException, message: str, clock: RunClock, before: tuple[str, str] | None
) -> None:
    """Record why the run failed: by the process that failed. That the others lost it is only a consequence.

    Args:
        before: Status and message of the run that was to be resumed; it stays so where its images are missing.
    """
    lost = lost_process(error)
    if before is not None and isinstance(error, MissingData):
        status, message = before
        return _record(run_dir, status, message, replace(clock, started=time.perf_counter()))
    # Only one process knows the cause; the others see a broken connection.
    if lost is None:
        _record(run_dir, "failed", message, clock)
    elif accelerator().is_main_process and run_dir.status() == "running":
        # Else the process that failed has recorded the cause, which says more.
        _record(run_dir, "failed", str(lost), clock)
