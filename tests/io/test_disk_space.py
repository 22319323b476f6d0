"""Room on a disk, asked for before the work and waited for after it."""

import os
import shutil
from pathlib import Path

import pytest

from remap.errors import DiskFull
from remap.io import disk_space


@pytest.mark.parametrize(("free", "fits"), [(1050, True), (1049, False)])
def test_room_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    """1000 bytes need 1050 free ones where the nearest folder is that is there already."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage if place == tmp_path else None)
    place = tmp_path / "runs" / "run"
    if fits:
        disk_space.require_space(place, 1000, "this run")
    else:
        with pytest.raises(DiskFull, match="this run will not fit on the disk: 1.0 kB needed, 1.0 kB free") as caught:
            disk_space.require_space(place, 1000, "this run")
        assert str(place) in str(caught.value) and "1,000 bytes needed, 1,049 bytes free" in str(caught.value)
        assert "another --output" in (caught.value.do or "") and caught.value.exit_code == 2
    assert os.listdir(tmp_path) == []


def test_a_write_is_tried_again_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two refusals, then room: one message, and the result of the third try."""
    monkeypatch.setattr(disk_space, "RETRY_EVERY", 0.001)
    answers, said = [DiskFull("cannot write x", given="1 byte"), DiskFull("cannot write x", given="1 byte"), 7], []

    def write() -> int:
        answer = answers.pop(0)
        if isinstance(answer, DiskFull):
            raise answer
        return answer

    assert disk_space.retry_until_room(write, 60.0, said.append) == 7
    assert said == ["cannot write x (1 byte); trying again for 1 min: free some space there"]
    answers.append(DiskFull("cannot write x"))
    with pytest.raises(DiskFull):
        disk_space.retry_until_room(write, 0.0, said.append)
