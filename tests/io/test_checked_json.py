"""JSON from outside: what is written is read, and what is damaged is the user's error."""

import os
from pathlib import Path

import pytest

from remap.errors import RunError
from remap.io import atomic_write, checked_json


def test_json_round_trip_in_utf8(tmp_path: Path) -> None:
    value = {"classes": ["ä", "蟻"], "accuracy": 0.1, "none": None}
    atomic_write.write_json(tmp_path / "a.json", value)
    assert checked_json.read_run_json(tmp_path / "a.json") == value
    atomic_write.write_bytes(tmp_path / "b.json", '"ä"'.encode())
    assert checked_json.read_run_json(tmp_path / "b.json") == "ä"


DAMAGED = {
    "missing": None,
    "empty": b"",
    "cut": b"{",
    "not text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "a key twice": b'{"a": 1, "a": 2}',
    "a terminal's": b'{"\x1b[2J": 1, "\x1b[2J": 1}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_json_is_the_users_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match="cannot read .*summary.json") as caught:
        checked_json.read_run_json(path)
    assert "\x1b" not in str(caught.value)


def test_json_without_end_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe that nobody writes to, and a terabyte without blocks on disk."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)
    for name, reason in (("pipe", "it is a FIFO"), ("large", "larger than")):
        with pytest.raises(RunError, match=reason):
            checked_json.read_run_json(tmp_path / name)
