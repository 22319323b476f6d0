"""Files in folders that other users may be able to write: opened only if they are ours, and through no link."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from remap.io.checked_read import read_bounded, require_regular, require_stored
from remap.io.names import plain

# The owners whose files are used: this user, and the administrator, who can do anything anyway.
_ROOT = 0


def open_own(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of this user; neither it nor its folder may be a link. A new file gets mode 0600.

    Raises:
        OSError: It is missing, or something else than that; ``strerror`` says what.
    """
    folder = _open(path.parent, os.O_DIRECTORY)
    try:
        file = _open(path, flags | os.O_NONBLOCK, folder)  # or a FIFO would wait for its other end
    finally:
        os.close(folder)
    try:
        found = os.fstat(file)
        require_regular(found.st_mode, str(path))
        # A second name may lie anywhere: what is written here would change a file there.
        if found.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR):
            raise _refused("it has a second name (a hard link)", path)
        require_stored(file)
    except BaseException:
        os.close(file)
        raise
    return file


def read_own(path: Path, limit: int) -> bytes:
    """Return the content of ``open_own``.

    Raises:
        OSError: As there, or it is larger than ``limit`` bytes.
    """
    with os.fdopen(open_own(path), "rb") as file:
        return read_bounded(file, limit, str(path))


def make_own_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for this user only (mode 0700).

    Raises:
        OSError: It cannot be made, or is there and is a link, another file or another user's.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            with suppress(FileExistsError):  # a broken link, or another process has just made it
                folder.mkdir(0o700)
    require_own_folder(path)


def require_own_folder(path: Path) -> None:
    """Raise an OSError unless a path is a folder of this user, and not a link."""
    os.close(_open(path, os.O_DIRECTORY))


def _open(path: Path, flags: int, folder: int | None = None) -> int:
    """Open a file or folder of this user, its last name not followed where it is a link."""
    name = path if folder is None else path.name
    try:
        file = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and path.is_symlink():
            raise _refused("it is a link", path) from error
        raise
    if os.fstat(file).st_uid not in (os.geteuid(), _ROOT):
        os.close(file)
        raise _refused("it belongs to another user", path)
    return file


def _refused(reason: str, path: Path) -> OSError:
    return OSError(errno.EPERM, f"{plain(str(path))} is not used: {reason}", str(path))
