"""A file is whole or as it was: full disks, odd places and not-a-number."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from remap import files
from remap.errors import RunError


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "metrics.json"
    files.write_text(path, "earlier")
    monkeypatch.setattr(os, step, lambda *_: full_disk(0))
    with pytest.raises(RunError) as caught:
        files.write_bytes(path, b"x" * 2000)
    monkeypatch.undo()
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["metrics.json"]
    text = str(caught.value)
    assert str(path) in text and os.strerror(errno.ENOSPC) in text and "2,000 bytes" in text
    assert "untouched" in text and caught.value.exit_code == 2


def test_an_interrupt_during_a_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "a", b"x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["missing/a.json", "file/a.json"])
def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(RunError, match="cannot write"):
        files.write_bytes(tmp_path / place, b"x")
    assert os.listdir(tmp_path) == ["file"]


def test_data_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    files.write_bytes(tmp_path / "a", b"\x00\xff")
    assert calls == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"\x00\xff"


def test_json_round_trip_in_utf8(tmp_path: Path) -> None:
    value = {"classes": ["ä", "蟻"], "accuracy": 0.1, "none": None}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    files.write_bytes(tmp_path / "b.json", '"ä"'.encode())
    assert files.read_json(tmp_path / "b.json") == "ä"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: float) -> None:
    """RFC 8259, section 6: numbers such as Infinity and NaN are not permitted."""
    path = tmp_path / "a.json"
    files.write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": value})
    assert json.loads(path.read_text()) == 1


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"], ids=["missing", "empty", "cut", "not text"])
def test_damaged_json_is_the_users_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match="cannot read .*summary.json"):
        files.read_json(path)


def test_folders_are_made_or_refused_with_a_reason(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make"):
        files.make_folder(tmp_path / "file" / "c")
