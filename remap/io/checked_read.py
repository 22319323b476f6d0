"""Reads of regular files within bounds; a FIFO or device would block for ever or never end."""

import errno
import hashlib
import io
import os
import stat
from pathlib import Path

# A larger file is refused when less than this share of it is on the disk: holes would be read for minutes.
DENSE_BYTES, LEAST_STORED = 2**26, 1 / 8
_OTHER_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def read_regular(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: It is missing, not a regular file, or larger than ``limit`` bytes; ``strerror`` says which.
    """
    with _opened(path) as file:
        return read_bounded(file, limit, os.fspath(path))


def read_bounded(file: io.BufferedReader, limit: int, name: str) -> bytes:
    """Return the content of an open file; raise an OSError where it is larger than ``limit`` bytes."""
    size = os.fstat(file.fileno()).st_size  # terabytes of holes need not be read to be too large
    data = b"" if size > limit else file.read(size + 1)  # a buffer of the limit's size would take 0.1 ms
    if len(data) > size:  # it has grown, or is of a kind that tells no size
        data += file.read(limit + 1 - len(data))
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", name)
    return data


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading in binary.

    Raises:
        OSError: It is missing, not a regular file, or mostly holes; ``strerror`` says which.
    """
    file = _opened(path)
    try:
        require_stored(file.fileno())
    except OSError:
        file.close()
        raise
    return file


def _opened(path: str | Path) -> io.BufferedReader:
    name = os.fspath(path)
    try:
        require_regular(os.stat(name).st_mode, name)
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except ValueError as error:  # a NUL, or a character that no file name has
        raise OSError(errno.EINVAL, "no file has such a name", name) from error
    try:
        require_regular(os.fstat(descriptor).st_mode, name)  # it may have been replaced meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a regular file of any size, in hex.

    Raises:
        OSError: As ``open_regular``.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_regular(mode: int, name: str) -> None:
    """Raise an OSError unless a mode is that of a regular file."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    kind = next((word for test, word in _OTHER_KINDS if test(mode)), "")
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", name)


def require_stored(descriptor: int) -> None:
    """Raise an OSError for a large file of which nearly nothing is on the disk."""
    found = os.fstat(descriptor)
    stored = 512 * getattr(found, "st_blocks", 0)
    # Some network drives count no blocks at all.
    if found.st_size > DENSE_BYTES and 0 < stored < LEAST_STORED * found.st_size:
        raise OSError(errno.EINVAL, f"it is mostly holes: {found.st_size:,} bytes, {stored:,} of them on the disk")
