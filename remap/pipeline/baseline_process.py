"""Train the baseline (see ``baseline``) beside the student, in a process of its own, where a CPU has cores for both.

Two small networks, each on half of the cores, take less time than one after the other on all of them: the more threads
share a step, the less each of them does. Which cores a run uses decides the last bits of its sums, so the choice
depends on nothing that changes between a run and its repetition or resumption, such as the free memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from remap.distributed.interrupts import SAVING_S
from remap.distributed.launch import accelerator
from remap.distributed.launcher_env import without_launcher
from remap.progress import Progress
from remap.runs.run_dir import RunDir

# Steps below which starting Python and PyTorch takes longer than it saves.
LEAST_STEPS = 200
COMMAND = (sys.executable, "-P", "-c", "from remap.pipeline.baseline_worker import main; main()")


def fits_beside(by_steps: bool, steps: int) -> bool:
    """Whether a baseline of so many steps trains beside its student: one process, on two CPU threads or more."""
    alone = accelerator().device.type == "cpu" and accelerator().num_processes == 1
    return alone and by_steps and steps >= LEAST_STEPS and torch.get_num_threads() > 1 and os.name == "posix"


class BaselineProcess:
    """A process that loads its libraries and then waits until it is given a baseline to train.

    Args:
        method: Of the student, whose libraries are loaded too: peft takes four seconds.
    """

    def __init__(self, method: str) -> None:
        environment, root = without_launcher(), Path(__file__).parents[2]
        if root.name not in ("site-packages", "dist-packages"):  # a checkout; an installed package is found as it is
            places = (str(root), environment.get("PYTHONPATH", ""))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        # Ctrl-C reaches the first process alone, which stops this one. Its input is closed when that one is killed.
        self._process = subprocess.Popen(
            (*COMMAND, method),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    def begin(self, run_dir: RunDir, threads: int) -> None:
        """Let it train the baseline in its run directory."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: the caller trains the baseline
            self._process.stdin.write(json.dumps([threads, str(run_dir.path.resolve())]).encode() + b"\n")
            self._process.stdin.flush()

    def wait(self, progress: Progress) -> None:
        """Wait until the baseline is trained, or the process has given up."""
        if self._process.poll() is None:
            with progress.wait("training on labels alone, to compare with"):
                self._process.wait()

    def stop(self) -> None:
        """End the process, which saves its state first; a second signal to this one ends it at once."""
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(SAVING_S)
        finally:
            self._process.kill()
            self._process.communicate()


@contextmanager
def waiting_process(baseline: Path, method: str) -> Iterator[BaselineProcess | None]:
    """Start a process for the baseline in this folder, and end it after the block.

    It loads while the teacher is prepared: begun with the student, it would end as much later than the student as
    loading takes.

    Yields:
        The process; None if the baseline is finished, or the system starts no other process.
    """
    process = None
    if not RunDir(baseline).is_done:
        with suppress(OSError):
            process = BaselineProcess(method)
    try:
        yield process
    finally:
        if process is not None:
            process.stop()


@contextmanager
def beside_student(process: BaselineProcess | None, run_dir: RunDir) -> Iterator[None]:
    """Let the process train the baseline while the block runs, on half of the threads each.

    Without a process too, where the baseline is finished or is trained later: the student's sums stay as they were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // 2)
    if process is not None:
        process.begin(run_dir, threads // 2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
