"""Killed while it saves, and a disk that is full: the checkpoint before is whole. Real signals, a real file system."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

WORKERS = Path(__file__).parent / "workers"
OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")


def _work(*command: str) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return _work(sys.executable, str(WORKERS / "saves.py"), str(tmp_path_factory.mktemp("saves") / "c"))


@pytest.mark.guarantee(4)
def test_killed_while_it_saves(saves: dict, figure: Callable[..., None]) -> None:
    """What is whole is judged by hashlib and numpy: each generation holds one number, that of its step."""
    kills, unfinished = saves["kills"], 0
    for kill in kills:
        assert kill["first"] <= kill["whole"] == kill["loaded"] <= kill["after"]
        pairs = {name.partition(".")[0] for name in kill["swept"]}
        assert len(pairs) == 2
        assert kill["swept"] == sorted(f"{pair}.{kind}" for pair in pairs for kind in ("json", "safetensors"))
        unfinished += kill["left"] != kill["swept"] and any(
            name.startswith(".") or name.replace(".safetensors", ".json") not in kill["left"] for name in kill["left"]
        )
    assert len(kills) == 20
    assert unfinished >= 3, "in a tight loop, about half of the kills leave a save that is seen to be unfinished"
    figure("SIGKILLs during a save, resumable", 20, 20)
    figure("files that a killed save left, after the next start", 0)


def test_processes_go_on_from_the_same_generation(saves: dict) -> None:
    """The second cannot read the newest: both take the one before. Sharded weights and moments are those of whole ones,
    also after one more step."""
    first, second = saves["two"]
    assert first["step"] == second["step"] == saves["last"] - 1
    assert ["cannot be read by another process" in text for text in first["told"]] == [True]
    assert ["is damaged" in text for text in second["told"]] == [True]
    assert first["equal"] and second["equal"]
    assert first["halves"] == second["halves"] == [[100, 210]] * 8


def test_what_one_process_cannot_read_stops_all_and_deletes_nothing(saves: dict) -> None:
    """A network drive that refuses the second one: nobody waits for ever, and nobody goes on from an older state."""
    first, second = saves["two"]
    assert first["refused"][0] == "ProcessLost" and "another process cannot read" in first["refused"][1]
    assert second["refused"][0] == "RunError" and "cannot be read: Stale file handle" in second["refused"][1]
    assert first["untouched"] and second["untouched"]


@pytest.mark.guarantee(7)
def test_a_full_disk(tiny: Any, tmp_path: Path, figure: Callable[..., None]) -> None:
    """A file system of 2 MB in memory, mounted in a namespace of its own, so that it takes no rights."""
    try:
        mounts = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True)
        alone = mounts.returncode == 0
    except FileNotFoundError:
        alone = False
    words = (str(tmp_path / "disk"), tiny.data, tiny.student, tiny.teacher)
    start = (*OWN_MOUNTS, sys.executable) if alone else (sys.executable,)
    said = _work(*start, str(WORKERS / "full_disk.py"), "mount" if alone else "limit", *words)

    kind, text, code = said["save"]
    assert (kind, code) == ("DiskFull", "2") and said["path"] in text
    assert f"{said['bytes']:,} bytes needed" in text
    assert not alone or f"{said['free']:,} bytes free" in text
    assert said["left"] == ["000001.json", "000001.safetensors", "000002.json", "000002.safetensors"]
    assert said["loaded"] == 2 and said["weights"] == [2.0]
    assert said["later"] == 3, "with room again, the same save is done"

    assert said["steps"] == 6 and len(said["warnings"]) == 1 and said["difference"] == 0.0

    kind, text, code = said["preflight"]
    assert (kind, code) == ("DiskFull", "2") and "will not fit on the disk" in text
    assert str(tmp_path / "disk" / "run") in text and "bytes needed" in text and "bytes free" in text
    assert said["preflight_steps"] == 0

    for kind, text, code in said["read_only"]:
        assert (kind, code) == ("RunError", "2") and "--output" in text
    assert said["read_only_steps"] == 0 and said["read_only_said"] == []
    figure("checkpoints lost to a full disk", 0)
