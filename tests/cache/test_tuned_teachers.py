"""Tuned teachers in the cache."""

import threading
from pathlib import Path
from typing import Any

import pytest

from remap.cache import tuned_teachers
from remap.cache.cache_folders import TASK_FILES
from remap.cache.tuned_teachers import fetch_teacher, store_teacher


def test_two_runs_that_store_one_teacher_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first is half way through a file; what is fetched is that of one of them."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        for name in TASK_FILES:
            (folder / name).write_text(f"{name} of {folder.name}\n" * 100)
    key, copy = {"teacher": "tiny"}, tuned_teachers.shutil.copyfileobj
    second = threading.Thread(target=store_teacher, args=(tmp_path / "root", key, folders[1]))

    def in_two_pieces(read: Any, write: Any, length: int) -> None:
        write.write(read.read(100))
        write.flush()
        if not second.ident:
            second.start()
            second.join(0.5)
        copy(read, write, length)

    monkeypatch.setattr(tuned_teachers.shutil, "copyfileobj", in_two_pieces)
    store_teacher(tmp_path / "root", key, folders[0])
    second.join()
    assert fetch_teacher(tmp_path / "root", key, tmp_path / "fetched")
    assert [(tmp_path / "fetched" / name).read_text() for name in TASK_FILES] == [
        (folders[1] / name).read_text() for name in TASK_FILES
    ]
