"""Tuned teachers, found by what decides their weights: each is tuned once and serves every later run.

    <root>/<24 hex of the key>/key.json                        what decides the weights, for people too
                              /task.safetensors, task.json     the teacher, as in a run directory
                              /.lock                           held by the process that writes them

As with outputs, a changed image, setting, backbone, machine or version is another key, and so another folder.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remap.cache.cache_folders import TASK_FILES, cache_id, has_cache, open_folder
from remap.errors import RunError
from remap.io import disk_space
from remap.io.atomic_write import make_folder
from remap.io.locks import one_by_one
from remap.io.own_files import open_own


def fetch_teacher(root: Path, key: Mapping[str, Any], folder: Path) -> bool:
    """Copy a stored teacher into a task folder; return whether there was one.

    Raises:
        RunError: The cache cannot be read, or the folder cannot be written.
    """
    stored = root / cache_id(key)
    if not has_cache(root, key) or not all((stored / name).exists() for name in TASK_FILES):
        return False
    with open_folder(root, key) as stored:
        _copy(stored, folder)
    return True


def store_teacher(root: Path, key: Mapping[str, Any], folder: Path) -> int:
    """Store the teacher of a task folder; return the bytes.

    Raises:
        RunError: It does not fit on the disk, or cannot be written.
    """
    nbytes = sum((folder / name).stat().st_size for name in TASK_FILES)
    disk_space.require_space(root, nbytes, "the tuned teacher")
    # Else two runs that tuned the same teacher would rename each other's half-written copies.
    with open_folder(root, key) as stored, one_by_one(stored / ".lock"):
        _copy(folder, stored)
    return nbytes


def _copy(source: Path, target: Path) -> None:
    make_folder(target)
    for name in TASK_FILES:
        draft = target / f".{name}.draft"
        draft.unlink(missing_ok=True)  # of a copy that was killed
        try:
            # Neither side may be a link: a cache may be shared, and a run directory come from elsewhere.
            with open(open_own(source / name), "rb") as read, open(draft, "xb") as write:
                shutil.copyfileobj(read, write, 2**20)
            draft.replace(target / name)
        except OSError as error:
            raise RunError(f"cannot copy {source / name} to {target}: {error.strerror}") from error
        finally:
            draft.unlink(missing_ok=True)
