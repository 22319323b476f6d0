"""Ctrl-C, SIGTERM and the file RUN/stop: a run saves its state and ends, all its processes together.

In loops over batches a signal sets a flag that is read between two of them. Elsewhere (models are built, a probe is
fitted) there is nothing to save, and it ends the run at once; so does a second signal anywhere.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator

from remap.distributed.collectives import all_reduce_max
from remap.errors import Interrupted

# These stand for the file, and for an exception in a callback, where a signal has its number; they end a run as SIGTERM
# does.
_FILE, CALLBACK = 1000, 1001
# Seconds between two checks for the file: on a network drive each one costs a round trip.
CHECK_EVERY = 1.0
# Seconds that a process which this one has started may take to save its state when it is stopped.
SAVING_S = 600.0


Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class _Watch:
    """Requests to stop that this process has received.

    Attributes:
        signal: Number of the first signal, 0 for none.
        deferring: How many ``defer_signals`` blocks are open.
        raised: What a signal raised outside of such blocks.
    """

    def __init__(self, file: Path | None) -> None:
        self.signal, self.deferring, self.file = 0, 0, file
        self.checked_at = -CHECK_EVERY
        self.earlier: dict[int, Handler] = {}
        self.raised: Interrupted | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            what = "stopped at once; nothing more was saved"
            self.raised = Interrupted(what, exit_code=signal_exit_code(number), at_once=True)
            raise self.raised
        self.signal = number
        if not self.deferring:
            self.raised = Interrupted(f"stopped by {signal_name(number)}", exit_code=signal_exit_code(number))
            if self.earlier[number] is signal.default_int_handler:  # a Python program, not the command line
                raise KeyboardInterrupt
            raise self.raised

    def check_file(self) -> None:
        # A network drive is not asked in every step.
        if self.file is None or self.signal or time.monotonic() - self.checked_at < CHECK_EVERY:
            return
        self.checked_at = time.monotonic()
        if self.file.is_file():
            with contextlib.suppress(OSError):
                self.file.unlink()
            self.signal = _FILE


_watch: _Watch | None = None


@contextmanager
def watch_signals(file: Path | None = None) -> Iterator[None]:
    """Catch SIGINT and SIGTERM while the block runs; inner blocks have no effect.

    Outside the main thread signals keep their meaning (Python allows handlers only there), and only the file counts.

    Args:
        file: Requests a stop when it appears; it is removed then, and when the block begins.
    """
    global _watch
    if _watch is not None:
        yield
        return
    watch = _watch = _Watch(file)
    if file is not None:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        watch.earlier = {number: signal.signal(number, watch.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception as error:
        if watch.raised is None or isinstance(error, Interrupted):
            raise
        # A library in which a handler raises may turn that into an error of another type.
        raise watch.raised from error
    finally:
        _watch = None
        for number, handler in watch.earlier.items():
            signal.signal(number, handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer the first signal until it is polled with ``requested_signal``."""
    watch = _watch
    if watch is None:
        yield
        return
    # Counted, since such blocks may lie inside each other.
    watch.deferring += 1
    try:
        yield
    finally:
        watch.deferring -= 1


@contextmanager
def never_held() -> Iterator[None]:
    """Raise what a second signal raised in the block, also where the code in it held it or made another error of it."""
    watch = _watch
    before = None if watch is None else watch.raised
    try:
        yield
    finally:
        raised = None if watch is None else watch.raised
        if raised is not None and raised is not before and raised.at_once:
            raise raised


def requested_signal(accelerator: Accelerator) -> int:
    """Return the signal that this process received, for ``signal_name`` and ``signal_exit_code``; 0 for none."""
    if _watch is None:
        return 0
    if accelerator.is_main_process:  # all processes of a run may see the same file
        _watch.check_file()
    return _watch.signal


def raise_if_interrupted(accelerator: Accelerator, what: str) -> None:
    """Raise on all processes if one of them received a signal. Every process has to call it.

    Args:
        what: What was being done, for the message.

    Raises:
        Interrupted: One did.
    """
    if _watch is None:
        return
    (number,) = all_reduce_max(accelerator, requested_signal(accelerator))
    if number:
        accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has left
        raise Interrupted(f"stopped by {signal_name(number)} while {what}", exit_code=signal_exit_code(number))


def signal_name(number: int) -> str:
    """Return what stopped a run, for messages."""
    return {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", _FILE: "the file `stop`", CALLBACK: "a callback"}[
        number
    ]


def signal_exit_code(number: int) -> int:
    """Return the exit code of a run that was stopped by it: 128 and the number, as shells have it."""
    return 128 + (signal.SIGTERM if number in (_FILE, CALLBACK) else number)
