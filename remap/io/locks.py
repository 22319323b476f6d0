"""A lock that processes hold one after the other."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from remap.io.own_files import open_own


@contextmanager
def one_by_one(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file at a path, which is made if need be, and hold it for the block.

    Where it cannot be opened or locked, the block runs without.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            lock = open_own(path, os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
