"""What comes from outside: files read within bounds, paths that cannot fail, JSON that is only data, names to show."""

import errno
import hashlib
import json
import math
import os
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Linux's PATH_MAX.
LONGEST_PATH = 4096
# Far beyond what remap writes (a million class names are some 20 MB), far below what fills a memory; and levels, far
# below where Python's own parser gives up.
MOST_JSON_BYTES, _JSON_DEPTH = 64 * 2**20, 64
# Characters that turn the text around them: embeddings, overrides and isolates (Unicode Annex 9, section 2).
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def expanded(word: str | Path) -> Path:
    """A path with ``~`` in place; ``~nobody``, which pathlib refuses, stays as it is."""
    return Path(os.path.expanduser(word))


def absolute(word: str | Path) -> str:
    """An absolute path without links; a circle of links, and what can be no path, stay as they are."""
    path = os.path.expanduser(word)
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL, or a character that no file name has
        return os.path.abspath(path)


def read_regular(path: str | Path, limit: int) -> bytes:
    """The content of a regular file: never of a FIFO or device, which would wait for ever or never end.

    Raises:
        OSError: It is missing, no regular file, or larger than ``limit`` bytes; ``strerror`` says which.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size  # a hole of terabytes need not be read to be too large
        data = b"" if size > limit else file.read(limit + 1)
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", os.fspath(path))
    return data


def open_regular(path: str | Path) -> Any:
    """A regular file opened for reading in binary.

    Raises:
        OSError: It is missing or no regular file.
    """
    name = os.fspath(path)
    try:
        _require_regular(os.stat(name).st_mode, name)
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except ValueError as error:  # a NUL, or a character that no file name has
        raise OSError(errno.EINVAL, "no file has such a name", name) from error
    try:
        _require_regular(os.fstat(descriptor).st_mode, name)  # it may have been replaced meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a regular file in hex, whatever its size.

    Raises:
        OSError: As ``open_regular``.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_regular(mode: int, name: str) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    kind = next((word for test, word in _KINDS if test(mode)), "")
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, no file", name)


def read_json(path: str | Path, limit: int = MOST_JSON_BYTES) -> Any:
    """JSON from a regular file of at most ``limit`` bytes.

    Raises:
        ValueError: It cannot be read, or ``parse_json`` refuses it; the message is the reason, fit for a terminal.
    """
    try:
        return parse_json(read_regular(path, limit))
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    except ValueError as error:
        raise ValueError(plain(str(error))) from error


def parse_json(data: bytes | str) -> Any:
    """JSON as RFC 8259 has it: no key twice, no NaN or Infinity, at most 64 levels.

    Raises:
        ValueError: It is not that.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_mapping, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("too many levels deep") from None
    layer = [value]
    for _ in range(_JSON_DEPTH):
        layer = [inner for outer in layer for inner in _inside(outer)]
    if layer:
        raise ValueError(f"more than {_JSON_DEPTH} levels deep")
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _mapping(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:40]!r} is given twice")
        found[key] = value
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return number


def is_number(value: object) -> bool:
    """Whether it is a finite number; a whole one is no larger than every reader of JSON keeps."""
    return math.isfinite(value) if isinstance(value, float) else type(value) is int and abs(value) < 2**53


def is_count(value: object) -> bool:
    """Whether it is such a whole number from 0."""
    return type(value) is int and is_number(value) and value >= 0


def plain(text: str, *, keep: str = "") -> str:
    """Text that a terminal, a log and an XML file show as it is: control characters, stray bytes of file names and
    characters that turn the direction of the text become escapes, as ``repr`` writes them; those in ``keep`` stay.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def unfit_for_a_place(path: str | Path) -> str | None:
    """What is wrong with a path, ``expanded`` before, at which something is to be made; None if nothing."""
    text = os.fspath(path)
    unfit = unfit_for_a_name(text)
    if unfit:
        return f"it holds {unfit}"
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return "it holds a character that no file name has"
    return f"no home folder is known for {text.split('/')[0]}" if text.startswith("~") else None


def unfit_for_a_name(text: str) -> str | None:
    """What makes a text unfit to be a name that people read and type: a control character, say; None if nothing."""
    for c in text:
        if unicodedata.category(c) in ("Cc", "Zl", "Zp"):
            return f"the control character {c!r}"
        if c in _TURNING:
            return f"the character {c!r}, which turns the text around it"
    return None
