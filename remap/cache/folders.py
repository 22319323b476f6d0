"""Folders of kept teacher outputs: one a key, all below one root. Needs neither torch nor numpy.

    <root>/<24 hex of the key>/key.json                              what decides the values, for people too
                              /items/<name-8 hex>/item.json          one kind of output; its records lie beside it

A folder's name is the hash of its key, so that a changed teacher, view, precision or version is another folder, and
only folders whose name and key agree are ever listed, used or deleted.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remap import __version__
from remap.errors import RunError
from remap.io.atomic_write import require_space as _require_space
from remap.io.checked_read import expanded, plain, read_json, unfit_for_a_place
from remap.io.versions import version_of

# Changes when files of another version could be read wrongly.
FORMAT = 1
# Digest and checksum beside each record.
ROW_BYTES = 20
KEY_FILE, ITEM_FILE, ITEMS, DATA_FILE, ROWS_FILE = "key.json", "item.json", "items", "data.bin", "rows.bin"
_NAME = re.compile(r"[0-9a-f]{24}")
_DRAFT, _DRAFT_SECONDS = ".draft-", 600.0


@dataclass(frozen=True)
class CacheKey:
    """All that decides a teacher's outputs for given image bytes and a given draw of the view.

    Args:
        teacher: The model's name, and whatever of its build its weights do not show (heads, patch size).
        state: Hash of all its weights and buffers, the head included.
        preprocessing: Size, mean and standard deviation of what enters it.
        view: Size, crop and interpolation of the common view, and the rule of augmentation.
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
        return json.loads(json.dumps(asdict(self), allow_nan=False))


@dataclass(frozen=True)
class ItemFolder:
    """One kind of output in a cache: ``records`` of ``shape``, as ``dtype`` (``top_k`` class probabilities of them)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    top_k: int | None
    records: int
    bytes: int


@dataclass(frozen=True)
class Cache:
    """One cache folder.

    Attributes:
        id: The folder's name.
        images: Records of its fullest item: an image counts once for each of its views.
        last_used: Seconds since the epoch.
    """

    id: str
    folder: Path
    key: dict[str, Any]
    items: tuple[ItemFolder, ...]
    images: int
    bytes: int
    last_used: float

    def to_dict(self) -> dict[str, Any]:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.last_used))
        return {**asdict(self), "folder": str(self.folder), "last_used": when}


@dataclass(frozen=True)
class Cleared:
    """What ``clear`` did: caches that are gone, and those that a running process holds open."""

    removed: tuple[Cache, ...]
    in_use: tuple[Cache, ...]

    @property
    def bytes(self) -> int:
        return sum(cache.bytes for cache in self.removed)


def cache_root(environment: Mapping[str, str] = os.environ) -> Path:
    """REMAP_CACHE, else remap in XDG_CACHE_HOME (ignored unless absolute, as its specification asks) or ~/.cache.

    Raises:
        RunError: No folder can have that name, or nobody is at home.
    """
    if environment.get("REMAP_CACHE"):
        base = expanded(environment["REMAP_CACHE"])
    elif Path(environment.get("XDG_CACHE_HOME", "")).is_absolute():
        base = Path(environment["XDG_CACHE_HOME"]) / "remap"
    else:
        base = expanded("~/.cache/remap")
    unfit = unfit_for_a_place(base)
    if unfit:
        raise RunError(
            "no place for the teacher cache",
            given=plain(f"{base}: {unfit}"),
            do="name a folder in the environment variable REMAP_CACHE",
        )
    return base.absolute() / "teachers"


def library_versions() -> dict[str, str]:
    """Versions whose change may change a teacher's outputs: remap's own, major.minor of torch and timm."""
    found = {name: ".".join(version_of(name).split(".")[:2]) for name in ("torch", "timm")}
    return {"remap": __version__, **found}


def cache_id(key: Mapping[str, Any], form: int = FORMAT) -> str:
    """The name of a key's folder."""
    text = json.dumps({"format": form, "key": key}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def has_cache(root: Path, key: Mapping[str, Any]) -> bool:
    """Whether something was kept under this key before."""
    return _read(root / cache_id(key)) is not None


@contextmanager
def held(root: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """A key's folder, made if need be; while it is held, ``clear`` leaves it alone.

    Raises:
        RunError: The place cannot be written, or the folder's key.json is damaged.
    """
    folder = root / cache_id(key)
    with _said(f"cannot make {root}"):
        root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    lock = _lock(folder, key)
    try:
        if _read(folder) is None:
            raise RunError(
                "a folder of the teacher cache is damaged: its key.json does not fit its name",
                given=folder,
                do=f"delete it and run again: rm -r {folder}",
            )
        with suppress(OSError):  # a cache that may only be read is still of use
            os.utime(folder / KEY_FILE)
        yield folder
    finally:
        os.close(lock)


def _lock(folder: Path, key: Mapping[str, Any]) -> int:
    """A shared lock on the key file that lies there now: another process may be deleting the folder."""
    while True:
        if not folder.exists():
            make_once(folder, {KEY_FILE: {"format": FORMAT, "key": key}})
        try:
            lock = os.open(folder / KEY_FILE, os.O_RDONLY)
        except FileNotFoundError:
            if folder.exists():
                raise RunError(
                    "a folder of the teacher cache has no key.json",
                    given=folder,
                    do=f"delete it and run again: rm -r {folder}",
                ) from None
            continue
        except OSError as error:
            raise RunError(f"cannot read the teacher cache: {error.strerror}", given=folder) from error
        fcntl.flock(lock, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder / KEY_FILE)):
                return lock
        os.close(lock)


def make_once(folder: Path, files: Mapping[str, Any]) -> None:
    """Make a folder with JSON files in it, whole from the first moment; another process may be faster.

    Raises:
        RunError: The place cannot be written.
    """
    with _said(f"cannot make {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder.parent))
        try:
            draft.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp makes it private, also where a group shares
            for name, content in files.items():
                with open(draft / name, "w", encoding="utf-8") as file:
                    file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            with suppress(FileExistsError):
                _rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, folder: Path) -> None:
    """Systems say differently that a folder with content is there."""
    try:
        draft.rename(folder)
    except OSError as error:
        raise FileExistsError if folder.is_dir() else error from error


@contextmanager
def _said(what: str) -> Iterator[None]:
    """A place that cannot be written is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{what}: {error.strerror}",
            do="make room there or make it writable, or name another place in the environment variable REMAP_CACHE",
        ) from error


def _sweep(folder: Path) -> None:
    """Remove drafts that their process did not live to rename, and what a killed ``clear`` left."""
    for path in (*folder.glob(f"{_DRAFT}*"), *folder.glob(f"*/{ITEMS}/{_DRAFT}*")):
        with suppress(OSError):
            if not path.is_symlink() and time.time() - path.stat().st_mtime > _DRAFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def list_caches(root: Path) -> list[Cache]:
    """All caches below a root, the last used first; folders that are none are passed over."""
    try:
        found = [_cache(folder) for folder in root.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"cannot read the teacher cache: {error.strerror}", given=root) from error
    return sorted((cache for cache in found if cache is not None), key=lambda cache: -cache.last_used)


def chosen_caches(
    root: Path, words: Sequence[str] = (), *, everything: bool = False, older_than_days: float | None = None
) -> list[Cache]:
    """The caches that a user means: by the beginning of their id, all of them, or those unused for some days.

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
            do="see what is there: remap cache ls",
        )
    if words:
        caches = list({cache.id: cache for word in words for cache in [_named(caches, word, root)]}.values())
    if older_than_days is not None:
        oldest = time.time() - older_than_days * 86400
        caches = [cache for cache in caches if cache.last_used < oldest]
    return caches


def _named(caches: Sequence[Cache], word: str, root: Path) -> Cache:
    fitting = [cache for cache in caches if word and cache.id.startswith(word.lower())]
    if len(fitting) == 1:
        return fitting[0]
    raise RunError(
        f"{len(fitting)} caches begin with this id" if fitting else f"no teacher cache of this id in {root}",
        given=word,
        allowed=[cache.id for cache in fitting or caches] or None,
        do="see what is there: remap cache ls",
    )


def clear(caches: Iterable[Cache]) -> Cleared:
    """Delete caches; those that a process holds are left, and no link is followed.

    Raises:
        RunError: A folder may not be deleted.
    """
    removed: list[Cache] = []
    in_use: list[Cache] = []
    for cache in caches:
        if _read(cache.folder) is None:  # gone, or no longer what was listed
            continue
        try:
            (removed if _remove(cache.folder) else in_use).append(cache)
        except OSError as error:
            raise RunError(f"cannot delete a teacher cache: {error.strerror}", given=cache.folder) from error
    return Cleared(tuple(removed), tuple(in_use))


def _remove(folder: Path) -> bool:
    """Delete a cache unless it is held. It leaves its place in one step, so that no half of it is ever found."""
    lock = os.open(folder / KEY_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        grave = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder.parent))
        folder.rename(grave / folder.name)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    shutil.rmtree(grave)  # unlinks links, and does not go where they lead
    return True


def _cache(folder: Path) -> Cache | None:
    content = _read(folder)
    if content is None:
        return None
    try:
        items = tuple(_item(path.parent) for path in sorted((folder / ITEMS).glob(f"[!.]*/{ITEM_FILE}")))
        last_used = (folder / KEY_FILE).stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):  # just being deleted, or damaged inside: still to be cleared
        items, last_used = (), 0.0
    images = max((item.records for item in items), default=0)
    return Cache(folder.name, folder, content["key"], items, images, sum(item.bytes for item in items), last_used)


def _item(folder: Path) -> ItemFolder:
    said = read_json(folder / ITEM_FILE)
    shape = tuple(int(side) for side in said["shape"])
    records = sum(_bytes(segment / ROWS_FILE) // ROW_BYTES for segment in folder.glob("seg-*"))
    return ItemFolder(str(said["name"]), shape, str(said["dtype"]), said["top_k"], records, _records_bytes(folder))


def _records_bytes(folder: Path) -> int:
    """Bytes of an item's records."""
    return sum(_bytes(segment / name) for segment in folder.glob("seg-*") for name in (DATA_FILE, ROWS_FILE))


def _bytes(path: Path) -> int:
    """0 for a file that its writer has yet to make."""
    return path.stat().st_size if path.exists() else 0


def _read(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's key.json, if it is one of ours: the name is the hash of the key."""
    path = folder / KEY_FILE
    if not _NAME.fullmatch(folder.name) or folder.is_symlink() or path.is_symlink():
        return None
    try:
        content = read_json(path)
        return content if cache_id(content["key"], content["format"]) == folder.name else None
    except (ValueError, KeyError, TypeError):
        return None


def require_space(root: Path, nbytes: int) -> None:
    """Refuse before the work when the records will not fit on the disk.

    Raises:
        DiskFull: It does not fit where ``root`` is or will be.
    """
    advice = (
        "clear old ones (remap cache ls, remap cache clear), or name another disk in REMAP_CACHE,",
        "or keep less: losses that read only logits or pooled features, --set teacher.top_k=100,",
        "or ask the teacher in every step: --set teacher.cache=off",
    )
    _require_space(root, nbytes, "the teacher's outputs", do="\n           ".join(advice))
