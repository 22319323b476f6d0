"""Train the baseline (see ``baseline``) beside the student, in a process of its own, where a CPU has cores for both.

Two small networks, each on half of the cores, take less time than one after the other on all of them: the more threads
share a step, the less each of them does. Which cores a run uses decides the last bits of its sums, so the choice
depends on nothing that changes between a run and its repetition or resumption, such as the free memory.
"""

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
    """A process that trains the baseline in its run directory."""

    def __init__(self, run_dir: RunDir, threads: int) -> None:
        environment, root = without_launcher(), Path(__file__).parents[2]
        if root.name not in ("site-packages", "dist-packages"):  # a checkout; an installed package is found as it is
            places = (str(root), environment.get("PYTHONPATH", ""))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        # Ctrl-C reaches the first process alone, which stops this one. Its input is closed when that one is killed.
        self._process = subprocess.Popen(
            [*COMMAND, str(run_dir.path.resolve()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

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
def baseline_beside(run_dir: RunDir) -> Iterator[BaselineProcess | None]:
    """Train a baseline in another process while the block runs, on half of the threads each.

    Yields:
        The process; None if the baseline is finished, or the system starts no other process: the caller trains it.
    """
    threads = torch.get_num_threads()
    # Also where the baseline is finished already: the student's sums stay as they were.
    torch.set_num_threads(threads // 2)
    process = None
    if not run_dir.is_done:
        with suppress(OSError):
            process = BaselineProcess(run_dir, threads // 2)
    try:
        yield process
    finally:
        torch.set_num_threads(threads)
        if process is not None:
            process.stop()
