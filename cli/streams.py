"""The three standard streams: one that the caller closed, and a stdout that can no longer be written to."""

import io
import os
import signal
import sys
from typing import Any


def open_closed() -> None:
    """Point a stream that the caller closed to nowhere: else the next file that is opened gets its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def watch_stdout() -> None:
    """Results that cannot be written are an error, one message long; a reader that has left, as `head -1`, is none."""
    if sys.stdout is sys.__stdout__:
        told = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors, "line_buffering": sys.stdout.isatty()}
        sys.stdout.flush()
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Stdout(sys.stdout.fileno(), "wb", closefd=False)), **told)


class _Stdout(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # nobody gets the rest
            if isinstance(error, BrokenPipeError):
                raise SystemExit(128 + signal.SIGPIPE) from None
            from remap.errors import RemapError

            raise RemapError(
                f"cannot write to stdout: {error.strerror}",
                do="free some space, or send the output elsewhere; what a run wrote into its folder is there",
            ) from error
