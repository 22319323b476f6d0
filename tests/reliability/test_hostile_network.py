"""No telemetry: whole runs with local models open no connection and look up no name."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Python's own audit events (PEP 578) see every connection and every look-up, whichever library makes them.
WATCHED = """
import json, os, sys

seen, commands = [], json.loads(sys.argv[1])


def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
        seen.append((event, str(arguments[-1])))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        programs.append(str(arguments[0]))


programs = []
sys.addaudithook(note)

import remap_cli.main

for words in commands:
    sys.argv = ["remap", *words]
    try:
        remap_cli.main.main()
    except SystemExit as leaving:
        assert not leaving.code, (words, leaving.code)
assert "torch" in sys.modules
# The hook works: it sees this one, to a port that nothing listens on.
quiet = list(seen)
import socket

with socket.socket() as own:
    own.connect_ex(("127.0.0.1", 9))
print(json.dumps({"seen": quiet, "programs": programs, "works": len(seen) > len(quiet)}), file=sys.__stdout__)
"""


@pytest.mark.guarantee(14)
def test_nothing_is_sent_anywhere(tiny: Any, tmp_path: Path, figure: Callable[..., None]) -> None:
    """One process: distill, eval, predict, and the listings."""
    import json

    run, image = tmp_path / "run", next((Path(tiny.data) / "val").rglob("*.png"))
    commands = [
        ["distill", *tiny.arguments("train.epochs=1", "teacher.allow_weak=true", losses="ce,kd"), "--output", str(run)],
        ["eval", str(run), "--json"],
        ["predict", str(run), str(image), "--json"],
        ["doctor"],
        ["methods"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == [] and found["works"]
    figure("connections opened by distill, eval, predict", len(found["seen"]))
