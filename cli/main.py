"""The ``remap`` command: signals, standard streams and exit codes around the Typer application in ``app``.

It imports nothing heavy itself, so that its signal handlers are in place before the long imports.
"""

import gc
import io
import os
import signal
import sys
from types import FrameType
from typing import Any

# Delay before re-sending a signal that a library swallowed, as imports may that catch every exception.
RESIGNAL_DELAY_S = 1.0
# How often a thread of a parallel operation looks whether the others are done before it sleeps: what GNU OpenMP takes
# itself where it knows of more threads than cores. Left alone, it looks for milliseconds, which decoding threads and
# other programs then do not get: predicting 2,500 photographs on two cores took 1.2 times as long, and beside one busy
# program up to 5 times.
_SPINS = "1000"
# The signal that stopped this command before a run could handle it; 0 for none.
_signal: int = 0


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM outside of a run. Not an ``Exception``, since libraries catch those around imports."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 a mistake, 130 or 143 stopped by a signal, 1 a bug."""
    global _signal
    _signal = 0
    code: Any = 0
    # A tenth of a listing's time each: looking for garbage, which imports make none of (``Reporter`` looks again), and
    # for plug-ins of pydantic in all packages.
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read once, when PyTorch loads
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        _open_streams()
        from remap_cli.app import app

        if "REMAP_LAUNCHED" in os.environ:  # as ``launch`` sets it, which help and listings do not need
            from remap_cli import launch

            launch.watch_parent()
        try:
            first = os.environ.get("RANK", "0") == "0"
            code = app(standalone_mode=first)  # which prints usage errors, once for all processes
        finally:
            sys.stdout.flush()
    except SystemExit as leaving:  # how Typer ends
        _ignore_signals()
        code = leaving.code
    except (Exception, _Stopped) as error:
        _ignore_signals()  # a second signal must not replace the message by a traceback
        code = _report(error)
    code = code or (128 + _signal if _signal else 0)
    # A stopped command does not wait for threads that read from a slow disk, nor a failed rank for the other ranks.
    if isinstance(code, int) and (code > 128 or (code and "RANK" in os.environ)):
        os._exit(code)
    sys.exit(code)


def _stop(number: int, _frame: FrameType | None) -> None:
    """Handle Ctrl-C and SIGTERM outside of a run, which has handlers that save first."""
    global _signal
    _signal = number
    # Sent to the handler that is in place by then: a run that has begun meanwhile saves its state.
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, RESIGNAL_DELAY_S)
    raise _Stopped


def _ignore_signals() -> None:
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _report(error: BaseException) -> int:
    """Report what ended the command, once; return the exit code."""
    from remap.errors import Interrupted, RemapError, refused_thread
    from remap_cli import launch

    if hasattr(error, "format_message"):  # Typer's, of another process than the first
        return 2
    distributed = sys.modules.get("remap.distributed.launch")  # a broken connection means that another process ended
    problem = error if isinstance(error, RemapError) else distributed and distributed.lost_process(error)
    problem = problem or refused_thread(error)  # of a library: the progress bars' for one
    if _signal and not isinstance(problem, Interrupted):  # whatever error it is, the signal caused it
        word = "interrupted" if _signal == signal.SIGINT else "terminated"
        what = f"{word}; there was nothing to save, and what was saved before stays"
        problem = Interrupted(what, exit_code=128 + _signal)
    return launch.report(problem or error)


class _Stream(io.FileIO):
    """A stdout whose errors are one message, and a stderr that loses what cannot be written: a run outlives its log."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 2:
                return len(data)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in a buffer is lost too
            if isinstance(error, BrokenPipeError):  # as in ``remap methods | head -1``
                raise SystemExit(1) from None
            from remap.errors import RemapError

            advice = "free some space, or send the output elsewhere; the folder of a run is not affected"
            raise RemapError(f"cannot write to stdout: {error.strerror}", do=advice) from error


def _open_streams() -> None:
    """Open streams that the caller closed: otherwise the next file that is opened would get what is printed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        elif number and getattr(sys, name) is getattr(sys, f"__{name}__"):
            old, raw = getattr(sys, name), io.BufferedWriter(_Stream(number, "wb", closefd=False))
            # Letters that the encoding lacks become escapes, also on stdout, where Python would end with an error.
            new = io.TextIOWrapper(raw, old.encoding, "backslashreplace", line_buffering=old.line_buffering)
            setattr(sys, name, new)
