"""Folders of cached teacher outputs: one a key, all below one root. Needs neither torch nor numpy.

    <root>/<24 hex of the key>/key.json                              what decides the values, for people too
                              /items/<name-8 hex>/item.json          one output; its segments lie in the same folder

A folder's name is the hash of its key, so that a changed teacher, view, precision or version is another folder, and
only folders whose name and key agree are ever listed, used or deleted. Everything is opened through
``remap.io.own_files``: another user, or a cache from elsewhere, may have put links, FIFOs or files of holes there.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remap import __version__
from remap.errors import RunError
from remap.io import disk_space
from remap.io.atomic_write import json_text, replace_file
from remap.io.checked_json import parse_json
from remap.io.names import plain
from remap.io.own_files import make_own_folder, open_own, read_own, require_own_folder
from remap.io.paths import expanded, path_problem
from remap.io.versions import version_of

# Changes when files of another version could be read wrongly.
FORMAT = 1
KEY_FILE, OUTPUT_FILE, OUTPUTS = "key.json", "item.json", "items"
# Far more than either of them has.
MOST_KEY_BYTES = 2**20
# The files of a segment, and what a record has in the second one: a digest of 16 bytes and a checksum of 4.
DATA_FILE, ROWS_FILE = "data.bin", "rows.bin"
DIGEST_BYTES, ROW_BYTES = 16, 20
# The files of a tuned teacher, in the order of writing: a task.json without its tensors would look damaged.
TASK_FILES = ("task.safetensors", "task.json")
_NAME = re.compile(r"[0-9a-f]{24}")
# Folders that are being made or deleted; after this many seconds their process is taken for dead.
DRAFT, _DRAFT_SECONDS = ".draft-", 600.0


@dataclass(frozen=True)
class CacheKey:
    """All that decides a teacher's outputs for given image bytes and given draws of the view.

    Args:
        teacher: The model's name, and what its weights do not show of its build (heads, patch size).
        state: Hash of all its weights and buffers, the head included.
        preprocessing: Size, mean and standard deviation of its input.
        view: Size, crop and interpolation of the common view, and the kind of augmentation.
        precision: Of its forward pass.
        versions: Of the libraries that compute it.
    """

    teacher: str
    state: str
    preprocessing: Mapping[str, Any]
    view: Mapping[str, Any]
    precision: str
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return values


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return REMAP_CACHE, else remap in XDG_CACHE_HOME (ignored unless absolute, as it specifies) or in ~/.cache.

    Raises:
        RunError: The cache path is invalid or the home directory is unknown.
    """
    if environment.get("REMAP_CACHE"):
        base = expanded(environment["REMAP_CACHE"])
    elif Path(environment.get("XDG_CACHE_HOME", "")).is_absolute():
        base = Path(environment["XDG_CACHE_HOME"]) / "remap"
    else:
        base = expanded("~/.cache/remap")
    problem = path_problem(base)
    if problem:
        raise RunError(
            "the path of the teacher cache is not valid",
            given=plain(f"{base}: {problem}"),
            do="name a folder in the environment variable REMAP_CACHE",
        )
    return base.absolute() / "teachers"


def prepared_root(outputs: Path | None = None) -> Path:
    """Return where tuned teachers are stored: beside the teachers' outputs."""
    return (cache_root() if outputs is None else outputs).with_name("prepared")


def texts_root(outputs: Path | None = None) -> Path:
    """Return where features of class texts are stored: beside the teachers' outputs."""
    return (cache_root() if outputs is None else outputs).with_name("texts")


def library_versions() -> dict[str, str]:
    """Return the versions whose change may change outputs: remap's own, major.minor of torch and timm."""
    versions = {name: ".".join(version_of(name).split(".")[:2]) for name in ("torch", "timm")}
    return {"remap": __version__, **versions}


def cache_id(key: Mapping[str, Any], form: int = FORMAT) -> str:
    """Return the name of a key's folder."""
    text = json.dumps({"format": form, "key": key}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_key(folder: Path) -> dict[str, Any] | None:
    """Return the key of a cache folder; None where it is not one: its name has to be the hash of the key."""
    if not _NAME.fullmatch(folder.name):
        return None
    try:
        content = parse_json(read_own(folder / KEY_FILE, MOST_KEY_BYTES))
        key: dict[str, Any] = content["key"]
        return key if cache_id(key, content["format"]) == folder.name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damaged_folders(root: Path) -> list[Path]:
    """Return folders named as caches are, whose key does not fit: they are never used or deleted, but take room."""
    try:
        return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and read_key(path) is None)
    except OSError:  # no caches yet; ``list_caches`` says what else is wrong
        return []


def has_cache(root: Path, key: Mapping[str, Any]) -> bool:
    """Return whether outputs were cached under this key before."""
    return read_key(root / cache_id(key)) is not None


@contextmanager
def open_folder(root: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a key's folder, made if need be; while it is open, ``clear`` leaves it alone.

    Raises:
        RunError: It cannot be made, or its key.json is damaged.
    """
    folder = root / cache_id(key)
    _remove_old_drafts(root)
    lock = _lock(folder, key)
    try:
        if read_key(folder) is None:
            raise _damaged(folder)
        with suppress(OSError):  # a cache that may only be read is still of use
            os.utime(lock)  # its time is when the cache was last used
        yield folder
    finally:
        os.close(lock)


def _lock(folder: Path, key: Mapping[str, Any]) -> int:
    while True:
        if not folder.exists():
            make_once(folder, KEY_FILE, {"format": FORMAT, "key": key})
        try:
            lock = open_own(folder / KEY_FILE)
        except FileNotFoundError:
            if folder.exists():
                raise _damaged(folder) from None
            continue  # another process has just deleted it
        except OSError as error:
            raise cannot_read(error, folder) from error
        # Shared by all that use the cache; ``clear`` needs the lock for itself alone.
        fcntl.flock(lock, fcntl.LOCK_SH)
        # While this process waited, another one may have deleted the folder, and the lock is on a file without a name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder / KEY_FILE)):
                return lock
        os.close(lock)


def cannot_read(error: OSError, path: Path) -> RunError:
    """Return the error for a cache that is damaged, of another user, or made to be followed elsewhere."""
    return RunError(
        f"cannot read the teacher cache: {error.strerror}",
        given=path,
        do="name a folder of your own in REMAP_CACHE, or delete what is wrong there",
    )


def _damaged(folder: Path) -> RunError:
    return RunError(
        "a folder of the teacher cache is damaged: its key.json is missing or does not fit its name",
        given=folder,
        do=f"delete it and run again: rm -r {folder}",
    )


def make_once(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Make a folder with one JSON file, complete from the first moment; another process may do it first.

    Raises:
        RunError: It cannot be written, or would lie in a folder of another user or behind a link.
    """
    try:
        make_own_folder(folder.parent)
    except OSError as error:
        raise _cannot_make(folder, error) from error
    if folder.is_dir():
        return
    try:
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=folder.parent) as draft:
            made = Path(draft, folder.name)
            made.mkdir(0o700)
            replace_file(made / name, json_text(content).encode())
            # A rename is one step, and fails where a folder with content is: the file locked there stays.
            made.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # systems have different errors for a folder that is there
            raise _cannot_make(folder, error) from error


def _cannot_make(folder: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot make {folder}: {error.strerror}",
        do="make room there or make it writable, or name another folder in REMAP_CACHE",
    )


def _remove_old_drafts(root: Path) -> None:
    """Remove what killed processes left half made or half deleted."""
    for path in (*root.glob(f"{DRAFT}*"), *root.glob(f"*/{OUTPUTS}/{DRAFT}*")):
        with suppress(OSError):
            for folder in (path, *path.parents[: len(path.relative_to(root).parts)]):
                require_own_folder(folder)  # or a link would have folders elsewhere deleted
            if time.time() - path.stat().st_mtime > _DRAFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def require_space(root: Path, nbytes: int) -> None:
    """Raise DiskFull before the work when the outputs will not fit where ``root`` is or will be."""
    advice = (
        "clear old ones (remap cache ls, remap cache clear), or name another disk in REMAP_CACHE,",
        "or cache less: losses that read only logits or pooled features, --set teacher.top_k=100,",
        "or run the teacher in every step: --set teacher.cache=off",
    )
    disk_space.require_space(root, nbytes, "the teacher's outputs", do="\n           ".join(advice))
