"""What is cached of teachers, and how it is cleared. Needs neither torch nor numpy."""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remap.cache import cache_folders
from remap.cache.cache_folders import DATA_FILE, KEY_FILE, ROWS_FILE, TASK_FILES, read_key
from remap.errors import RunError
from remap.io.checked_json import parse_json
from remap.io.own_files import open_own, read_own

# The id of all features of class texts together, and the name of one file of them.
TEXTS, _TEXT_FILE = "texts", re.compile(r"[0-9a-f]{24}\.safetensors")


@dataclass(frozen=True)
class CachedOutput:
    """One output in a cache: ``records`` of ``shape``, as ``dtype`` (of class probabilities the ``top_k`` largest)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    top_k: int | None
    records: int
    bytes: int


@dataclass(frozen=True)
class Cache:
    """One cache folder: a teacher's outputs, its tuned weights, or features of class texts.

    Attributes:
        id: The folder's name.
        images: Records of the output that has most: an image counts once for each of its views.
        last_used: Seconds since the epoch.
    """

    id: str
    folder: Path
    key: dict[str, Any]
    outputs: tuple[CachedOutput, ...]
    images: int
    bytes: int
    last_used: float

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.last_used))
        # In JSON, outputs are called "items", as their folders are.
        return {**values, "folder": str(self.folder), "items": values.pop("outputs"), "last_used": when}


@dataclass(frozen=True)
class Cleared:
    """What ``clear`` did: caches that are gone, and those that a running process uses."""

    removed: tuple[Cache, ...]
    in_use: tuple[Cache, ...]

    @property
    def bytes(self) -> int:
        return sum(cache.bytes for cache in self.removed)


def list_caches(root: Path) -> list[Cache]:
    """Return all caches below a root of outputs and beside it, the last used first; other folders are passed over.

    Raises:
        RunError: The root cannot be read.
    """
    caches: list[Cache | None] = []
    for place in (root, cache_folders.prepared_root(root)):
        try:
            caches += [_cache(folder) for folder in place.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise RunError(f"cannot read the teacher cache: {error.strerror}", given=place) from error
    caches.append(_texts(cache_folders.texts_root(root)))
    return sorted((cache for cache in caches if cache is not None), key=lambda cache: -cache.last_used)


def chosen_caches(
    root: Path, words: Sequence[str] = (), *, everything: bool = False, older_than_days: float | None = None
) -> list[Cache]:
    """Return the caches that a user means: by the beginning of their id, all of them, or those unused for some days.

    Raises:
        RunError: A word fits no cache or several, or nothing was chosen at all.
    """
    caches = list_caches(root)
    if words and everything:
        raise RunError("either name caches or take all of them", given=f"{' '.join(words)} --all")
    if not (words or everything or older_than_days is not None):
        raise RunError(
            "nothing was chosen to be cleared",
            allowed="the beginning of an id, --all, --older-than DAYS",
            do="list the caches: remap cache ls",
        )
    if words:
        # Two words may mean the same cache.
        chosen = [_named(caches, word, root) for word in words]
        caches = list({cache.id: cache for cache in chosen}.values())
    if older_than_days is not None:
        oldest = time.time() - older_than_days * 86400
        caches = [cache for cache in caches if cache.last_used < oldest]
    return caches


def _named(caches: Sequence[Cache], word: str, root: Path) -> Cache:
    # An empty word would begin every id.
    fitting = [cache for cache in caches if word and cache.id.startswith(word.lower())]
    if len(fitting) == 1:
        return fitting[0]
    raise RunError(
        f"{len(fitting)} caches begin with this id" if fitting else f"no teacher cache of this id in {root.parent}",
        given=word,
        allowed=[cache.id for cache in fitting or caches] or None,
        do="list the caches: remap cache ls",
    )


def clear(caches: Iterable[Cache]) -> Cleared:
    """Delete caches; those that a process uses are left, and no link is followed.

    Raises:
        RunError: A folder may not be deleted.
    """
    removed: list[Cache] = []
    in_use: list[Cache] = []
    for cache in caches:
        # Between listing and clearing, a person may have confirmed: the folder may be gone, or another one by now.
        try:
            if cache.id == TEXTS:
                _remove_texts(cache.folder)
                removed.append(cache)
            elif read_key(cache.folder) is not None:
                (removed if _remove(cache.folder) else in_use).append(cache)
        except OSError as error:
            raise RunError(f"cannot delete a teacher cache: {error.strerror}", given=cache.folder) from error
    return Cleared(tuple(removed), tuple(in_use))


def _remove(folder: Path) -> bool:
    """Delete a cache unless it is in use."""
    lock = open_own(folder / KEY_FILE)
    try:
        # Each process that uses the cache holds a shared lock; this one fails at once if there is any.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Renamed first, which is one step, so that no process ever finds half of a cache.
        with tempfile.TemporaryDirectory(prefix=cache_folders.DRAFT, dir=folder.parent) as grave:
            folder.rename(Path(grave, folder.name))
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _text_files(folder: Path) -> list[Path]:
    """Return the files of ``remap.cache.text_features``, through no link."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    return [path for path in folder.iterdir() if _TEXT_FILE.fullmatch(path.name) and not path.is_symlink()]


def _texts(folder: Path) -> Cache | None:
    """Return the features of class texts as one cache; None where there are none."""
    try:
        found = [path.stat() for path in _text_files(folder)]
    except OSError as error:
        raise RunError(f"cannot read the features of class texts: {error.strerror}", given=folder) from error
    if not found:
        return None
    nbytes, last_used = sum(one.st_size for one in found), max(one.st_mtime for one in found)
    return Cache(TEXTS, folder, {"teacher": "class texts", "texts": len(found)}, (), 0, nbytes, last_used)


def _remove_texts(folder: Path) -> None:
    """Delete features of class texts. Whoever uses them has read them completely."""
    for path in _text_files(folder):
        path.unlink(missing_ok=True)


def _cache(folder: Path) -> Cache | None:
    key = read_key(folder)
    if key is None:
        return None
    try:
        outputs = tuple(
            _output(path.parent)
            for path in sorted(folder.glob(f"{cache_folders.OUTPUTS}/[!.]*/{cache_folders.OUTPUT_FILE}"))
        )
        last_used = (folder / KEY_FILE).stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):  # just being deleted, or damaged inside: still to be cleared
        outputs, last_used = (), 0.0
    images = max((output.records for output in outputs), default=0)
    nbytes = sum(output.bytes for output in outputs) + sum(_bytes(folder / name) for name in TASK_FILES)
    return Cache(folder.name, folder, key, outputs, images, nbytes, last_used)


def _output(folder: Path) -> CachedOutput:
    content = parse_json(read_own(folder / cache_folders.OUTPUT_FILE, cache_folders.MOST_KEY_BYTES))
    # Sizes of files, not records: a listing must not read gigabytes, nor lock out a writer.
    data, rows = (sum(_bytes(path / name) for path in folder.glob("seg-*")) for name in (DATA_FILE, ROWS_FILE))
    shape = tuple(int(side) for side in content["shape"])
    name, dtype = str(content["name"]), str(content["dtype"])
    return CachedOutput(name, shape, dtype, content["top_k"], rows // cache_folders.ROW_BYTES, data + rows)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # its writer may have yet to make it
