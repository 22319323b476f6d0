"""Generations of a checkpoint: files of which one pair is always complete, whenever the writer is killed.

    FOLDER/000012.safetensors    tensors
           000012.json           format, generation, SHA-256 and bytes of the tensors, the state, and its own SHA-256

The manifest is written after the tensors, each to a temporary file, flushed to disk and renamed: a generation counts
only with a manifest that fits. One process writes into a folder; all of a run may read.
"""

import contextlib
import hashlib
import json
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from remap.errors import RunError
from remap.io import atomic_write
from remap.io.atomic_write import make_folder, write_bytes
from remap.io.checked_json import MOST_JSON_BYTES, parse_json
from remap.io.checked_read import read_regular, sha256_of
from remap.io.names import plain
from remap.io.sealed_json import seal

# Changes when files of another version could be read wrongly.
FORMAT = 1
# The older one stands in where the newest turns out to be damaged.
GENERATIONS = 2
_NAME = re.compile(r"(\d{6,15})\.(safetensors|json)")
# What reading raises where a file is gone, or not as it was written; any other OSError says nothing about its content.
_GONE = (FileNotFoundError, NotADirectoryError)
_DAMAGED = (IsADirectoryError, SafetensorError, ValueError, KeyError, TypeError, AssertionError, RuntimeError)
# Network drives refuse reads for a moment (ESTALE, EIO): how often a read is tried, and seconds in between.
TRIES, PAUSE = 4, 0.5
# Instead of a generation's number: one could not be read, so it is not known whether it is complete.
UNREADABLE = -1
S = TypeVar("S")


def write(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the next generation, then drop all but the newest two.

    Raises:
        DiskFull: There is no room; the earlier generations are complete.
        RunError: The folder cannot be written, or the one above is gone.
    """
    if not folder.parent.is_dir():  # making it again would split a run that was moved in two
        raise RunError(
            f"{folder.parent} has been moved or removed",
            given="no such folder",
            do="rename it back, then continue with --resume",
        )
    make_folder(folder)
    sweep(folder)  # first, so that there is room
    number = max(_numbers(folder), default=0) + 1
    # Serialised first: its hash and size go into the manifest.
    data = save(dict(tensors))
    write_bytes(path_of(folder, number), data)
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {"format": FORMAT, "generation": number, "tensors": digest, "state": state}
    text = json.dumps({**body, "sha256": seal(body)}, indent=1, allow_nan=False)
    write_bytes(path_of(folder, number, "json"), text.encode())
    sweep(folder)  # only now: the oldest counts until the new manifest is there


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was ever completed here, even if it is damaged by now."""
    # A writer that was killed in its first save leaves tensors number 1 only.
    return bool(_numbers(folder)) or any(kind == "safetensors" and number > 1 for _, number, kind in _files(folder))


def sweep(folder: Path, last: int | None = None) -> None:
    """Delete all but the newest two generations up to ``last``, and what killed writers left."""
    newest = sorted(number for number in _numbers(folder) if last is None or number <= last)[-GENERATIONS:]
    atomic_write.remove_temporary_files(folder)
    for path, number, _ in _files(folder):  # sorted: a manifest goes before its tensors
        if number not in newest:
            with contextlib.suppress(OSError):
                path.unlink()  # what cannot be deleted costs room only, and the next sweep tries again


class Reader(Generic[S]):
    """Reads generations from the newest down, and collects what is wrong with those that are damaged.

    Args:
        limit: Bytes of tensors above which a file is not read.
        parse: Checks the state of a manifest; raises a ValueError where something is wrong with it.

    Attributes:
        loaded: State and tensors of the generation that was read last.
        problems: One sentence for each damaged generation.
        refusal: Why a file could not be read at all.
    """

    def __init__(self, folder: Path, limit: int, parse: Callable[[object], S]) -> None:
        self.folder, self.limit, self.parse = folder, limit, parse
        self.problems: list[str] = []
        self.refusal: RunError | None = None
        self.loaded: tuple[S, dict[str, Tensor]] | None = None

    def newest(self, last: int | None = None) -> int:
        """Read the newest complete generation that is not after ``last``.

        Returns:
            Its number, 0 if there is none. ``UNREADABLE`` if a file could not be read, see ``refusal``: its content
            is not known, and continuing from an older one would throw it away.
        """
        self.loaded = None
        try:
            for number in sorted(_numbers(self.folder), reverse=True):
                if last is None or number <= last:
                    try:
                        self.loaded = _retry(path_of(self.folder, number), partial(self._read, number))
                        return number
                    except _Damaged as problem:
                        self.problems.append(str(problem))
        except RunError as refusal:
            self.refusal = refusal
            return UNREADABLE
        return 0

    def _read(self, number: int) -> tuple[S, dict[str, Tensor]]:
        """Read one generation. The tensors are parsed only once their hash fits.

        Raises:
            _Damaged: One of the two files is missing or damaged.
        """
        path, manifest = path_of(self.folder, number), path_of(self.folder, number, "json")
        with _judging(manifest):
            _require_plain(manifest, MOST_JSON_BYTES)
            content = parse_json(read_regular(manifest, MOST_JSON_BYTES))
            if not isinstance(content, dict) or content.pop("sha256", None) != seal(content):
                raise ValueError("its own SHA-256 differs")
            if content.get("format") != FORMAT or content.get("generation") != number:
                raise ValueError(f"it is not of generation {number} in format {FORMAT}")
            state = self.parse(content["state"])
            expected = content["tensors"]["bytes"], content["tensors"]["sha256"]
        with _judging(path):
            # The size costs no reading, so a file that was cut short is found before it is hashed.
            if _require_plain(path, self.limit) != expected[0]:
                raise ValueError("it is longer or shorter than its manifest says")
            if sha256_of(path) != expected[1]:
                raise ValueError("its SHA-256 differs from that in its manifest")
            return state, load_file(path)


class _Damaged(Exception):
    """A file of a generation is missing or damaged; says which one, and why."""


@contextlib.contextmanager
def _judging(path: Path) -> Iterator[None]:
    """Turn what goes wrong inside into ``_Damaged`` for this file."""
    try:
        yield
    except _GONE as error:
        raise _Damaged(f"{path} is missing") from error
    except _DAMAGED as error:
        reason = "it is not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
        raise _Damaged(f"{path} is damaged: {plain(reason)}") from error


def _retry(path: Path, read: Callable[[], S]) -> S:
    """Read again where the system refuses for a moment.

    Raises:
        RunError: It still refuses in the end.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return read()
        except _GONE:  # waiting does not bring a file back
            raise
        except (OSError, MemoryError) as error:
            if attempt == TRIES:
                reason = error.strerror if isinstance(error, OSError) else "not enough memory"
                raise RunError(
                    f"{getattr(error, 'filename', None) or path} cannot be read: {reason}; nothing in its folder was"
                    " changed",
                    do="check disk and memory of this machine, then continue with --resume",
                ) from error
        time.sleep(PAUSE)
    raise AssertionError("the last attempt returns or raises")


def path_of(folder: Path, number: int, kind: str = "safetensors") -> Path:
    """Return where the tensors of a generation are, or its manifest ("json")."""
    return folder / f"{number:06d}.{kind}"


def _require_plain(path: Path, limit: int) -> int:
    """Return the bytes of a file that is neither a link nor a device nor too large to be ours."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise ValueError(f"it is not a plain file of at most {limit:,} bytes")
    return status.st_size


def _files(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Yield what checkpoints left in a folder: path, generation and "json" or "safetensors"."""
    # A listing that fails must not look like an empty folder, which would be a new start.
    for path in _retry(folder, lambda: sorted(folder.iterdir()) if folder.is_dir() else []):
        if match := _NAME.fullmatch(path.name):
            number, kind = match.groups()
            # A second spelling of a number would be a second file of one generation.
            if f"{int(number):06d}" == number:
                yield path, int(number), kind


def _numbers(folder: Path) -> list[int]:
    """Return the generations that have a manifest."""
    # 0 says in ``Reader.newest`` that there is none, so no generation has that number.
    return [number for _, number, kind in _files(folder) if kind == "json" and number]
