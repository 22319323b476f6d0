"""Files that are either complete or absent: write to a temporary file, flush to disk, rename."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remap.errors import DiskFull, RunError, naming
from remap.io.disk_space import FULL, MAKE_ROOM, free_bytes
from remap.io.links import files_below
from remap.io.names import plain
from remap.io.paths import path_problem

# What ``replace_file`` writes before it renames.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_ELSEWHERE = "choose another path, in a folder that exists and can be written"


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` atomically; a crash, a power cut or a full disk leaves the earlier file as it was.

    Args:
        durable: Wait for the disk. Without, a power cut may cost the file: for what is written many times a second.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def create_file(path: Path, data: bytes) -> None:
    """Write ``path`` atomically, unless it is there already, as of another process.

    Raises:
        OSError: It cannot be written.
    """
    draft = path.with_name(f".{path.name}.new.{os.getpid()}.tmp")
    try:
        replace_file(draft, data)
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, or what ``replace_file`` raises again
        replace_file(path, data)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """``replace_file`` for what a user has to mend.

    Raises:
        DiskFull: There is no room.
        RunError: It cannot be written.
    """
    try:
        replace_file(path, data, durable=durable)
    except OSError as error:
        what, unchanged = f"cannot write {path}: {error.strerror}", "files written earlier are unchanged"
        if error.errno in FULL:
            given = f"{len(data):,} bytes needed, {free_bytes(path.parent):,} bytes free"
            raise DiskFull(what, given=given, do=f"{MAKE_ROOM}; {unchanged}") from error
        raise RunError(what, do=f"{_ELSEWHERE}; {unchanged}") from error


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """``write_bytes`` for UTF-8 text."""
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: Path, value: Any) -> None:
    """``write_bytes`` for JSON; not-a-number is refused, so the file is valid everywhere."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return the text of a JSON file of remap.

    Raises:
        ValueError: It holds a number that is not finite.
    """
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def utf8_json(value: Any) -> bytes:
    """Return JSON in one line of UTF-8; only stray bytes of a file name are escapes."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there yet.

    Raises:
        DiskFull: There is no room.
        RunError: It cannot be made, or no folder can have such a name.
    """
    problem = path_problem(path)
    if problem:
        raise RunError("no folder can be made there", given=plain(f"{path}: {problem}"), do=_ELSEWHERE)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind, do = (DiskFull, MAKE_ROOM) if error.errno in FULL else (RunError, _ELSEWHERE)
        raise kind(f"cannot make {path}: {error.strerror}", do=do) from error


def readable_as(model: Path, path: Path) -> None:
    """Give a file the rights of another one: the safetensors library lets its user alone read what it writes."""
    shutil.copymode(model, path)


def is_empty(folder: Path) -> bool:
    """Return whether a folder is there and holds nothing but what killed writers left."""
    try:
        return all(_TEMPORARY.fullmatch(name) for name in os.listdir(folder))
    except OSError:  # not there, not a folder, or not for this user
        return False


@contextlib.contextmanager
def new_folder(path: Path, last: str = "") -> Iterator[Path]:
    """Yield a path where a folder is to be made and filled; it becomes ``path`` when the block ends without an error.

    An empty folder may be there. It stays the same one and is filled, since it may be a mount, or where a shell is.
    What killed writers of the same folder left goes at the end; one that still writes cannot succeed any more.

    Args:
        last: The file that says that such a folder is complete: it comes after all others.

    Raises:
        OSError: The folder cannot be made, or others have filled it meanwhile.
    """
    fills = is_empty(path)
    folder, word = (path, "new") if fills else (path.parent, path.name)
    temporary = folder / f".{word}.{os.getpid()}.tmp"
    try:
        with naming(path, temporary):
            yield temporary
        if not fills:
            os.rename(temporary, path)
        elif not is_empty(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        else:
            for name in sorted(os.listdir(temporary), key=lambda name: name == last):
                os.rename(temporary / name, path / name)
        with contextlib.suppress(OSError):  # one may write in a folder that one may not list
            for name in os.listdir(folder):
                if re.fullmatch(rf"\.{re.escape(word)}\.\d+\.tmp", name):
                    shutil.rmtree(folder / name, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary_files(folder: Path) -> None:
    """Delete the temporary files that killed writers left in a folder and in those below it."""
    for path in files_below(folder):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a file's new name last through a power cut; some file systems refuse to sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
