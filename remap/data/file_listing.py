"""Files in a folder, read within bounds; ``tar_listing`` and ``zip_listing`` give the same for archives."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from remap.data.images import MAX_BYTES
from remap.errors import DataError
from remap.io.checked_read import read_regular
from remap.io.paths import LONGEST_PATH

# Files and folders of one source; the largest public sets of images have 15 million.
MOST_ENTRIES = 20_000_000
# Levels of folders in it, far below where Python gives up.
MOST_LEVELS = 128
# How often links may lead to the same folder; circles of links lead there without end.
MOST_VISITS = 16


@dataclass(frozen=True)
class Listing:
    """Files and folders of a folder or archive as relative paths, what reads a file, and what tells its size in bytes.

    The size of what cannot be read is -1. ``spans`` are offset and bytes of each file in a plain tar, ``left_out`` the
    members of an archive that are not files, with what they are.
    """

    paths: tuple[str, ...]
    folders: tuple[str, ...]
    read: Callable[[str], bytes]
    size: Callable[[str], int]
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    left_out: tuple[tuple[str, str], ...] = ()

    def inside(self, prefix: str) -> "Listing":
        """Return what lies below a folder ("photos/"), relative to it."""
        if not prefix:
            return self
        paths, folders = (
            tuple(path.removeprefix(prefix) for path in names if path.startswith(prefix))
            for names in (self.paths, self.folders)
        )
        return Listing(paths, folders, lambda path: self.read(prefix + path), lambda path: self.size(prefix + path))


def list_folder(root: Path) -> Listing:
    """List all files below a folder, links followed. What is not a regular file is an error when it is read.

    Raises:
        DataError: A folder cannot be read or lies too deep, or links go in a circle.
    """
    paths: list[str] = []
    folders: list[str] = []
    for prefix, below, names in walk_folder(root):
        paths += [prefix + name for name in names]
        folders += [prefix + name for name in below]
        require_few(len(paths) + len(folders), root)
    return files_of(root, paths, folders)


def walk_folder(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder below a folder, links followed: its relative path ("a/b/"), and the sorted names in it.

    Raises:
        DataError: As ``list_folder``.
    """
    visits: Counter[tuple[int, int]] = Counter()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_unreadable):
        below[:] = sorted(name for name in below if not _links_up(folder, name))
        for name in below:
            status = os.stat(os.path.join(folder, name))
            visits[status.st_dev, status.st_ino] += 1
            if visits[status.st_dev, status.st_ino] > MOST_VISITS:
                raise DataError(
                    "links to folders go in a circle, or lead to the same folder many times",
                    given=os.path.join(folder, name),
                    do="remove the link",
                )
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        if prefix.count("/") > MOST_LEVELS:
            raise DataError(
                f"{root} holds folders that are more than {MOST_LEVELS} levels deep",
                do="name the folder that the images are in",
            )
        yield prefix, below, sorted(names)


def files_of(root: Path, paths: Sequence[str] = (), folders: Sequence[str] = ()) -> Listing:
    """Return the listing of these files in a folder."""

    def size(path: str) -> int:
        try:
            return os.stat(root / path).st_size
        except (OSError, ValueError):
            return -1

    return Listing(tuple(sorted(paths)), tuple(sorted(folders)), lambda p: read_regular(root / p, MAX_BYTES), size)


def member_path(name: str) -> str:
    """Return the path of an archive's member without leading slashes and dots; nothing is ever written at it.

    Raises:
        ValueError: It is longer than any path.
    """
    if len(name) > LONGEST_PATH:
        raise ValueError(f"a name in it has more than {LONGEST_PATH:,} letters")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def require_few(count: int, source: Path) -> None:
    """Refuse a source of more than ``MOST_ENTRIES`` files and folders."""
    if count > MOST_ENTRIES:
        raise DataError(f"{source} holds more than {MOST_ENTRIES:,} files and folders")


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"a folder cannot be read: {error.strerror}", given=error.filename, do="make it readable, or remove it"
    ) from error


def _links_up(folder: str, name: str) -> bool:
    """Whether a sub-folder is a link to a folder it lies in, which would be walked for ever."""
    path = os.path.join(folder, name)
    above = os.path.join(os.path.realpath(folder), "")
    return os.path.islink(path) and above.startswith(os.path.join(os.path.realpath(path), ""))
