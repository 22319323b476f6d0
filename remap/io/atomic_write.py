"""Files that are either whole or absent: write beside, flush to disk, rename; and their sizes in words."""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from remap.errors import DiskFull, RunError
from remap.io import checked_read

# What ``write_bytes`` writes into before it renames.
_DRAFT = re.compile(r"\..+\.\d+\.tmp")
# Seconds between two tries to write to a full disk.
RETRY_EVERY = 5.0
T = TypeVar("T")
# No room: on the disk, in the user's quota, or under a limit of file sizes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ELSEWHERE = "choose another --output, or let this place be written"
_ROOM = "free some space or choose another --output"
# Free space asked for beyond the files themselves: folders, file system, other programs.
_MARGIN = 1.05


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically; a crash, a power cut or a full disk leaves the earlier file as it was.

    Raises:
        DiskFull: There is no room.
        RunError: The place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        untouched = "files written earlier are untouched"
        if error.errno in _FULL:
            raise DiskFull(
                f"cannot write {path}: {error.strerror}",
                given=f"{len(data):,} bytes needed, {_free(path.parent):,} bytes free",
                do=f"{_ROOM}; {untouched}",
            ) from error
        raise RunError(f"cannot write {path}: {error.strerror}", do=f"{_ELSEWHERE}; {untouched}") from error


def sweep(folder: Path) -> None:
    """Delete what writers that were killed left in a folder and in those below it."""
    for path in _below(folder):
        if _DRAFT.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def require_no_links(folder: Path) -> None:
    """Refuse a folder that came with links inside: what is written or deleted below them would lie elsewhere.

    The folder itself may be a link; see ``require_no_link``.

    Raises:
        RunError: There is one, at any depth; nothing was touched.
    """
    for path in _below(folder):
        require_no_link(path)


def require_no_link(path: Path) -> None:
    """Refuse a link that the user did not name.

    Raises:
        RunError: It is one; nothing was touched.
    """
    if path.is_symlink():
        raise RunError(
            f"{checked_read.plain(str(path))} is a link, and remap writes to no place that a link in a run leads to;"
            " nothing was touched",
            given=f"it leads to {checked_read.plain(os.readlink(path))}",
            do="if you made it, put in its place what it leads to; else do not go on with what a stranger gave you",
        )


def _below(folder: Path) -> Iterator[Path]:
    """All that lies in a folder and in those below it, but not where links lead; what cannot be listed is left out."""
    waiting = [str(folder)]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                yield Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def _sync_folder(folder: Path) -> None:
    """Make a file's new name last through a power cut; some file systems refuse, and have no more to give."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there yet.

    Raises:
        DiskFull: There is no room.
        RunError: The place cannot be written, or no folder can have such a name.
    """
    unfit = checked_read.unfit_for_a_place(path)
    if unfit:
        raise RunError("no folder can be made there", given=checked_read.plain(f"{path}: {unfit}"), do=_ELSEWHERE)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        full = error.errno in _FULL
        kind, do = (DiskFull, _ROOM) if full else (RunError, _ELSEWHERE)
        raise kind(f"cannot make {path}: {error.strerror}", do=do) from error


def require_space(folder: Path, needed: int, what: str, do: str = _ROOM) -> None:
    """Refuse before the work when what it will write does not fit on the disk.

    Args:
        folder: Where it will be written; it need not be there yet.
        needed: Bytes, without a margin.
        what: The subject of the message, as in "the teacher's outputs".

    Raises:
        DiskFull: Less than 1.05 times ``needed`` is free.
    """
    free = _free(folder)
    if free < _MARGIN * needed:
        raise DiskFull(
            f"{what} will not fit on the disk: {size(needed)} needed, {size(free)} free",
            given=f"{folder}: {needed:,} bytes needed, {free:,} bytes free",
            do=do,
        )


def _free(folder: Path) -> int:
    """Bytes that this user may still write where ``folder`` is or will be."""
    place = folder.absolute()
    while not os.path.exists(place):  # nor where it cannot be looked at
        place = place.parent
    return shutil.disk_usage(place).free


def once_there_is_room(write: Callable[[], T], seconds: float, say: Callable[[str], None]) -> T:
    """Call ``write`` until the disk takes it: what took days to compute must not be lost to a disk that is full now.

    Args:
        seconds: How long to try; it is tried every ``RETRY_EVERY``.
        say: Is told once what is waited for.

    Raises:
        DiskFull: There is no room after that time either.
    """
    until, told = time.monotonic() + seconds, False
    while True:
        try:
            return write()
        except DiskFull as error:
            if time.monotonic() >= until:
                raise
            if not told:
                say(f"{error.what} ({error.given}); trying again for {seconds / 60:.0f} min: free some space there")
            told = True
            time.sleep(RETRY_EVERY)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """``write_bytes`` for JSON; not-a-number is refused, so the file is valid everywhere."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """``checked_read.read_json`` for the files of a run directory.

    Raises:
        RunError: It is missing or damaged.
    """
    try:
        return checked_read.read_json(path)
    except ValueError as error:
        raise RunError(f"cannot read {path}: {error}", do="name a run directory that `remap` wrote") from error


def size(nbytes: float) -> str:
    """Bytes in the unit a reader would choose."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
