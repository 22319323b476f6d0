"""Ctrl-C, SIGTERM and the file RUN/stop: a run saves its state and leaves, all its processes together.

In loops over batches a signal is a flag that is read between two of them. Elsewhere (models are built, a probe is
fitted) there is nothing to save, and it ends the run at once; so does a second signal anywhere.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from accelerate import Accelerator

from remap.distributed.collectives import all_reduce_max
from remap.errors import Interrupted

# The file in place of a signal's number; it ends a run as SIGTERM does.
_FILE = 1000
# Seconds between two looks for the file: on a network drive each one costs.
LOOK_EVERY = 1.0


class _Watch:
    """What has asked this process to stop.

    Attributes:
        signal: Its number, 0 for none.
        deferring: Blocks entered in which a signal waits for the next look.
        raised: What a signal raised where it did not wait.
    """

    def __init__(self, file: Path | None) -> None:
        self.signal, self.deferring, self.file = 0, 0, file
        self.looked = -LOOK_EVERY
        self.earlier: dict[int, object] = {}
        self.raised: Interrupted | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            what = "stopped at once; nothing more was saved"
            self.raised = Interrupted(what, exit_code=signal_exit_code(number), at_once=True)
            raise self.raised
        self.signal = number
        if not self.deferring:
            self.raised = Interrupted(f"stopped by {signal_name(number)}", exit_code=signal_exit_code(number))
            earlier = self.earlier[number]
            if callable(earlier):
                earlier(number, frame)
            raise self.raised

    def look_for_file(self) -> None:
        if self.file is None or self.signal or time.monotonic() - self.looked < LOOK_EVERY:
            return
        self.looked = time.monotonic()
        if self.file.is_file():
            with contextlib.suppress(OSError):
                self.file.unlink()
            self.signal = _FILE


_watch: _Watch | None = None


@contextmanager
def watch_signals(file: Path | None = None) -> Iterator[None]:
    """Catch SIGINT and SIGTERM while the block runs; blocks inside one another are one.

    Outside the main thread signals keep their meaning, and the file alone counts.

    Args:
        file: One that asks to stop as soon as it is there; it is removed then, and when the block begins.
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
        # A library that was at work when the signal came may report something else than what was raised in it.
        raise watch.raised from error
    finally:
        _watch = None
        for number, handler in watch.earlier.items():
            signal.signal(number, handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """In this block a first signal waits until somebody asks for it."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.deferring += 1
    try:
        yield
    finally:
        watch.deferring -= 1


def requested_signal(accelerator: Accelerator) -> int:
    """What this process got, for ``signal_name`` and ``signal_exit_code``; 0 for nothing."""
    if _watch is None:
        return 0
    if accelerator.is_main_process:
        _watch.look_for_file()
    return _watch.signal


def raise_if_interrupted(accelerator: Accelerator, what: str) -> None:
    """Leave, all processes together, if one of them got a signal. Called by all of them.

    Args:
        what: What was going on, for the message.

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
    """What stopped a run, in words."""
    return {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", _FILE: "the file `stop`"}[number]


def signal_exit_code(number: int) -> int:
    """The exit code that stands for it."""
    return 128 + (signal.SIGTERM if number == _FILE else number)
