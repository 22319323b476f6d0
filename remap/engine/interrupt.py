"""Ctrl-C and SIGTERM become a flag that the loop reads between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

from remap.errors import Interrupted


class StopFlag:
    """Set by a signal; a second signal leaves at once."""

    def __init__(self) -> None:
        self.signal = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise Interrupted("stopped at once; the last checkpoint is whole", exit_code=128 + number)
        self.signal = number

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process got, 0 for none, so that all leave at the same step."""
        if accelerator.num_processes == 1:
            return self.signal
        value = torch.tensor([self.signal], device=accelerator.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return int(value.item())


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGINT and SIGTERM while the block runs (main thread only; elsewhere signals keep their meaning)."""
    flag = StopFlag()
    try:
        earlier = {number: signal.signal(number, flag._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
