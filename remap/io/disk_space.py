"""Room on a disk: asked for before the work, waited for after it."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from remap.errors import DiskFull
from remap.io.human_size import size

T = TypeVar("T")
# No room: on the disk, in the user's quota, or under a limit of file sizes.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAKE_ROOM = "free some space or choose another --output"
# Seconds between two tries to write to a full disk.
RETRY_EVERY = 5.0
# Free space required beyond the files themselves: folders, file system, other programs.
_MARGIN = 1.05


def require_space(folder: Path, needed: int, what: str, do: str = MAKE_ROOM) -> None:
    """Refuse before the work when what it will write does not fit on the disk.

    Args:
        folder: Where it will be written; it need not exist yet.
        needed: Bytes, without a margin.
        what: The subject of the message, as in "the teacher's outputs".

    Raises:
        DiskFull: Less than 1.05 times ``needed`` is free.
    """
    free = free_bytes(folder)
    if free < _MARGIN * needed:
        raise DiskFull(
            f"{what} will not fit on the disk: {size(needed)} needed, {size(free)} free",
            given=f"{folder}: {needed:,} bytes needed, {free:,} bytes free",
            do=do,
        )


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write where ``folder`` is or will be."""
    path = folder.absolute()
    while not os.path.exists(path):  # also false where this user may not look
        path = path.parent
    return shutil.disk_usage(path).free


def retry_until_room(write: Callable[[], T], seconds: float, say: Callable[[str], None]) -> T:
    """Call ``write`` until the disk takes it: a disk that is full now must not cost what took days to compute.

    Args:
        seconds: How long to try; one try every ``RETRY_EVERY`` seconds.
        say: Called once with a message while waiting for disk space.

    Raises:
        DiskFull: There is no room after that time either.
    """
    until, said = time.monotonic() + seconds, False
    while True:
        try:
            return write()
        except DiskFull as error:
            if time.monotonic() >= until:
                raise
            if not said:
                say(f"{error.what} ({error.given}); trying again for {seconds / 60:.0f} min: free some space there")
            said = True
            time.sleep(RETRY_EVERY)
