"""Symbolic links in folders from outside: what is written or deleted below them would lie elsewhere."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from remap.errors import RunError
from remap.io.names import plain


def require_no_links(folder: Path) -> None:
    """Raise a RunError for a folder that holds a link at any depth. It may be one itself; see ``require_no_link``."""
    for path in files_below(folder):
        require_no_link(path)


def require_no_link(path: Path) -> None:
    """Raise a RunError for a link, which the user did not name."""
    if path.is_symlink():
        raise RunError(
            f"{plain(str(path))} is a link, and remap does not write through links in a run; nothing was touched",
            given=f"it leads to {plain(os.readlink(path))}",
            do="if you made it, replace it by what it leads to; otherwise do not continue this run",
        )


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files and folders below a folder, links not followed; what cannot be listed is left out."""
    waiting = [str(folder)]  # not recursive: strangers' folders may be deeper than Python's stack
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                yield Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
