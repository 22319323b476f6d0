"""The three standard streams: one that the caller closed, and one that can no longer be written to."""

import contextlib
import io
import os
import select
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


def watch() -> None:
    """Results that cannot be written are an error, one message long; a reader that has left, as `head -1`, is none.

    Messages that cannot be written are lost, and nothing else is: a run outlives its log.
    """
    for name, kind in (("stdout", _Stdout), ("stderr", _Stderr)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):
                stream.flush()
            told = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
            raw = kind(stream.fileno(), "wb", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **told))


class _Stream(io.FileIO):
    def write(self, data: Any) -> int:
        while (written := super().write(data)) is None:  # the caller made it non-blocking, and its reader is behind
            select.select((), (self,), ())
        return written


class _Stderr(_Stream):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:  # the next message may get through, as when a disk has room again
            return len(data)


class _Stdout(_Stream):
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
