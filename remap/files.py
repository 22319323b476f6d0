"""Files that are either whole or absent: write beside, flush to disk, rename; and their sizes in words."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from remap.errors import RunError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically; a crash or a full disk leaves the earlier file as it was.

    Raises:
        RunError: The disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise RunError(
            f"cannot write {path}: {error.strerror}",
            given=f"{len(data):,} bytes to write",
            do="free some space or choose another --output; files written earlier are untouched",
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there yet.

    Raises:
        RunError: The disk is full or the place cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make {path}: {error.strerror}", do="free some space or choose another --output"
        ) from error


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """``write_bytes`` for JSON; not-a-number is refused, so the file is valid everywhere."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}", do="name a run directory that `remap` wrote") from error


def size(nbytes: float) -> str:
    """Bytes in the unit a reader would choose."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
