"""A file is complete or as it was: full disks, paths that cannot be written, and not-a-number."""

import errno
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest

from remap.errors import DiskFull, RunError
from remap.io import atomic_write


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    """The same file, so that a lock on it is a lock on what others open."""
    path = tmp_path / "settings.json"
    atomic_write.create_file(path, b"one")
    number = path.stat().st_ino
    atomic_write.create_file(path, b"two")
    assert (path.read_bytes(), path.stat().st_ino, os.listdir(tmp_path)) == (b"one", number, ["settings.json"])


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_failing_write_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """No room has its own class, and says how much there is; a real full disk: tests/reliability."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "metrics.json"
    atomic_write.write_text(path, "earlier")
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage if place == tmp_path else None)
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RunError) as caught:
        atomic_write.write_bytes(path, b"x" * 2000)
    monkeypatch.undo()
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["metrics.json"]
    text, full = str(caught.value), number != errno.EIO
    assert str(path) in text and os.strerror(number) in text and "unchanged" in text and caught.value.exit_code == 2
    assert isinstance(caught.value, DiskFull) is full
    assert ("2,000 bytes needed, 1,234 bytes free" in text) is full


def test_a_full_disk_is_told_from_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(DiskFull, match="cannot make .*No space left"):
        atomic_write.make_folder(tmp_path / "a")


def test_an_interrupt_during_a_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write.write_bytes(tmp_path / "a", b"x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["missing/a.json", "file/a.json"])
def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(RunError, match="cannot write"):
        atomic_write.write_bytes(tmp_path / place, b"x")
    assert os.listdir(tmp_path) == ["file"]


def test_data_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name is, before the call returns."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    kind = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(kind[stat.S_ISDIR(os.fstat(fd).st_mode)]) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    atomic_write.write_bytes(tmp_path / "a", b"\x00\xff")
    assert calls == ["file", "replace", "folder"] and (tmp_path / "a").read_bytes() == b"\x00\xff"


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    before = len(os.listdir("/proc/self/fd"))
    atomic_write.write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x" and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: float) -> None:
    """RFC 8259, section 6: numbers such as Infinity and NaN are not permitted."""
    path = tmp_path / "a.json"
    atomic_write.write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write.write_json(path, {"loss": value})
    assert json.loads(path.read_text()) == 1


def test_folders_are_made_or_refused_with_a_reason(tmp_path: Path) -> None:
    atomic_write.make_folder(tmp_path / "a" / "b")
    atomic_write.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make"):
        atomic_write.make_folder(tmp_path / "file" / "c")


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_writer_left_of_a_folder_goes_with_the_next_one(tmp_path: Path, there: bool) -> None:
    """Weights of any size, in a folder that is hidden; what other writers left of other folders stays."""
    path = tmp_path / "model"
    left = (path / ".new.99999.tmp") if there else (tmp_path / ".model.99999.tmp")
    for folder in (left, tmp_path / ".models.99999.tmp"):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"half")
    with atomic_write.new_folder(path, last="b") as temporary:
        temporary.mkdir()
        for name in "ba":
            (temporary / name).touch()
    assert sorted(os.listdir(path)) == ["a", "b"]
    assert sorted(os.listdir(tmp_path)) == [".models.99999.tmp", "model"]
