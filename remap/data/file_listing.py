"""Files in a folder, read within bounds; ``tar_listing`` gives the same for a tar."""

import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from remap.data.images import MAX_BYTES
from remap.errors import DataError
from remap.io.checked_read import read_regular
from remap.io.names import plain

# Files and folders of one source; the largest public sets of images have 15 million.
MOST_ENTRIES = 20_000_000
# Levels of folders in it, far below where Python gives up.
MOST_LEVELS = 128
# How often links may lead to the same folder; circles of links lead there without end.
MOST_VISITS = 16


@dataclass(frozen=True)
class Listing:
    """Files and folders of a folder or tar as relative paths, and what reads a file."""

    paths: tuple[str, ...]
    folders: tuple[str, ...]
    read: Callable[[str], bytes]


def list_folder(root: Path) -> Listing:
    """List all files below a folder, links followed. What is not a regular file is an error when it is read.

    Raises:
        DataError: A folder cannot be read or lies too deep, or links go in a circle.
    """
    paths: list[str] = []
    folders: list[str] = []
    visits: Counter[tuple[int, int]] = Counter()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_unreadable):
        below[:] = [name for name in below if not _links_up(folder, name)]
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
        paths += [prefix + name for name in names]
        folders += [prefix + name for name in below]
        require_few(len(paths) + len(folders), root)
    return Listing(tuple(sorted(paths)), tuple(sorted(folders)), lambda p: read_regular(root / p, MAX_BYTES))


def unwrapped(listing: Listing, not_into: Collection[str]) -> Listing:
    """Step into a single folder that holds everything, as archives often have one; not into one in ``not_into``."""
    tops = {path.split("/")[0] for path in listing.paths}
    deep = all(path.count("/") >= 2 for path in listing.paths)
    if len(tops) != 1 or not deep or next(iter(tops)).lower() in not_into:
        return listing
    prefix = f"{tops.pop()}/"
    inside = tuple(folder.removeprefix(prefix) for folder in listing.folders if folder.startswith(prefix))
    paths = tuple(path.removeprefix(prefix) for path in listing.paths)
    return Listing(paths, inside, lambda path: listing.read(prefix + path))


def is_hidden(name: str) -> bool:
    """Return whether a name is one of those that file managers leave behind: .DS_Store, ._name, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def why_skipped(path: str) -> str:
    """Return why a file among images is left out."""
    suffix = plain(PurePosixPath(path).suffix)[:20]
    return f"{suffix} files are not taken from folders of images" if suffix else "it has no suffix"


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
