"""Commands in processes that are forked from the test's, which has imported everything: PyTorch and timm take 10 s.

For what one or several processes compute or leave when they are killed. Tests whose subject is how processes are
started, or what they write where, start real ones (``start_process``).
"""

import io
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from remap.distributed.launch import accelerator

SOAK = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "soak.py"))
fork, wait = SOAK["fork"], SOAK["wait"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def be_one_of(count: int, rank: int, port: int) -> None:
    """What a launcher says to its processes; whatever this process knew as a single one is forgotten."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count), ("LOCAL_WORLD_SIZE", count)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator.cache_clear()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Forked:
    """A module (``remap_cli``) or script and its arguments, in ``count`` processes as under a launcher."""

    def __init__(self, folder: Path, command: Sequence[str], count: int) -> None:
        port = free_port()
        self.errors = [folder / f"errors-{rank}" for rank in range(count)]
        self.outputs = [folder / f"output-{rank}" for rank in range(count)]
        works = [partial(_run, command, self.outputs[rank], count, rank, port) for rank in range(count)]
        self.pids = [fork(work, path) for work, path in zip(works, self.errors, strict=True)]
        self.codes: list[int | None] = []

    def alive(self) -> bool:
        """Whether the first process runs."""
        with suppress(ChildProcessError):
            if not self.codes and os.waitpid(self.pids[0], os.WNOHANG) == (0, 0):
                return True
        return False

    def end(self, seconds: float = 200.0) -> str:
        """Wait until all have ended well; what the first one printed."""
        self.codes = [wait(pid, seconds) for pid in self.pids]
        assert not any(self.codes), (self.codes, [path.read_text() for path in self.errors])
        return self.outputs[0].read_text()

    def kill(self) -> None:
        """End all as SIGKILL does, if they still run."""
        for pid in () if self.codes else self.pids:
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _run(command: Sequence[str], output: Path, count: int, rank: int, port: int) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    if count > 1:
        be_one_of(count, rank, port)
    sys.argv = list(command)
    try:
        if command[0].endswith(".py"):
            runpy.run_path(command[0], run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
