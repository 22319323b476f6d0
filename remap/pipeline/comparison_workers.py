"""Cells of a comparison side by side, in processes that take cell after cell."""

import math
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from remap.cache.shared_outputs import FOLDER, SharedOutputs
from remap.distributed.device_memory import reset_peak
from remap.distributed.interrupts import SAVING_S
from remap.distributed.launch import accelerator
from remap.errors import Interrupted, RemapError, RunError
from remap.io import links
from remap.pipeline.comparison_cells import Cell
from remap.pipeline.comparison_resources import Resources
from remap.pipeline.run import run
from remap.progress import CELLS, Progress, Silent, Step, Within
from remap.recipe.schema import Recipe
from remap.runs.run_dir import RunDir

# Clean processes that have imported everything once. A fork of this one would inherit locks and the state of a GPU.
START_METHOD = "forkserver"


@dataclass(frozen=True)
class Slot:
    """Where one cell after the other runs: CPU threads, and a GPU by its number."""

    threads: int
    gpu: int | None = None


def run_cell(cell: Cell, output: Path, resources: Resources, progress: Progress, steps_after: int = 0) -> float:
    """Run one cell, or continue it from its checkpoint; return its student's accuracy (NaN: not judged)."""
    path = output / cell.name
    links.require_no_link(path)  # or the run would be written elsewhere
    shared = resources.of(cell, output)
    resuming = (path / "recipe.yaml").is_file()
    run_dir = RunDir.open(path) if resuming else RunDir.create(path, cell.recipe)
    found = run(cell.recipe, run_dir, progress, shared, resuming=resuming, steps_after=steps_after)
    accuracy = found.summary["student"]["accuracy"]
    return math.nan if accuracy is None else accuracy


def require_all(failed: Mapping[str, str], count: int) -> None:
    """Raise a RunError if any of so many cells failed; ``failed`` holds the reasons by name."""
    if failed:
        name, reason = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {count} cells failed; the others are finished",
            given=f"{', '.join(failed)}; {name}: {reason}",
            do="start the same comparison again, or without the methods that failed; finished cells are not run again",
        )


@dataclass(frozen=True)
class Done:
    """How a cell ended: with its student's accuracy, or why it failed."""

    accuracy: float = math.nan
    failed: str | None = None


# What a process sends: a line to show, None where it begins the cell that it was sent, and how that ended.
Message = str | Done | None


@dataclass
class Worker:
    """A process, and the cell that it was sent."""

    process: Any
    slot: Slot
    cell: Cell | None = None
    has_begun: bool = False


class Pool:
    """Processes, one a slot, and the cells that wait."""

    def __init__(self, slots: Sequence[Slot], output: Path, recipe: Recipe, progress: Progress) -> None:
        self._free, self._output, self._recipe, self._progress = list(slots), output, recipe, progress
        self._context: Any = multiprocessing.get_context(START_METHOD)
        if START_METHOD == "forkserver":
            self._context.set_forkserver_preload([__name__])
        self._workers: dict[Connection, Worker] = {}
        self._waiting: list[Cell] = []
        self._returned: set[str] = set()
        self._failed: dict[str, str] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        self._waiting = waiting = list(reversed(cells))  # taken from the end, the first cell first
        with self._progress.wait(CELLS, len(cells)) as shown, self._ended():
            shown.advance(0, **{cell.name: math.nan for cell in cells})
            while waiting or any(worker.cell for worker in self._workers.values()):
                while self._free and waiting:
                    self._start(self._free.pop(0))
                for connection, worker in self._workers.items():
                    if worker.cell is None and waiting:
                        worker.cell, worker.has_begun = waiting.pop(), False
                        self._progress.say(f"[{len(cells) - len(waiting)}/{len(cells)}] {worker.cell.name}")
                        shown.advance(0, **{worker.cell.name: math.inf})
                        with suppress(OSError):  # it has died, which the next look finds
                            connection.send(worker.cell)
                for heard in wait(list(self._workers)):
                    assert isinstance(heard, Connection)
                    self._hear(heard, shown)
        require_all(self._failed, len(cells))

    def _start(self, slot: Slot) -> None:
        """Start a process; where the system refuses one, raise a RunError."""
        try:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=work, args=(theirs, slot, self._output, self._recipe), daemon=False)
            process.start()
        except (OSError, EOFError) as error:  # EOFError: of the fork server, which could not start it
            reason = (isinstance(error, OSError) and error.strerror) or "the system refuses it"
            what = f"cannot start another process for the cells, beside {len(self._workers)}: {reason}"
            do = "start the same comparison again with fewer: --jobs N (finished cells are not run again)"
            raise RunError(what, do=do) from error
        theirs.close()  # else the end of the process would not end the connection
        self._workers[ours] = Worker(process, slot)

    def _hear(self, connection: Connection, shown: Step) -> None:
        """Take one message, or the end of a process."""
        worker = self._workers[connection]
        try:
            message: Message = connection.recv()
        except (EOFError, OSError):
            message = self._lost(connection)
        if isinstance(message, str):
            self._progress.say(message)
        elif message is None:
            worker.has_begun = True
        elif (cell := worker.cell) is not None:
            worker.cell = None
            if message.failed is not None:
                self._failed[cell.name] = message.failed
                self._progress.say(f"{cell.name} failed: {message.failed}")
            shown.advance(1, **{cell.name: message.accuracy})

    def _lost(self, connection: Connection) -> Message:
        """Give up a process that has ended; return how its cell did. One that it had not begun waits again, once."""
        worker = self._workers.pop(connection)
        connection.close()
        worker.process.join()
        self._free.append(worker.slot)
        if worker.cell is not None and not worker.has_begun and worker.cell.name not in self._returned:
            self._returned.add(worker.cell.name)
            self._waiting.append(worker.cell)
            return None
        code = worker.process.exitcode
        hint = "; the system kills processes when memory runs out" if code == -9 else ""
        # Of SIGTERM, whether it came to a run, which saves its state and ends, or before.
        how = "was stopped" if code in (0, -15) else f"ended with exit code {code}{hint}"
        return Done(failed=f"its process {how}")

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """End all processes; cells that are stopped save their state first."""
        try:
            yield
        finally:
            for connection, worker in self._workers.items():
                if worker.cell is not None:
                    worker.process.terminate()
                with suppress(OSError):  # also after the signal, which comes too late for a cell that is about to end
                    connection.send(None)
            try:
                self._join()
            finally:  # a second signal
                for worker in self._workers.values():
                    worker.process.kill()
                    worker.process.join()

    def _join(self) -> None:
        """Wait for all processes, as long as saving may take; what they say is read, or a full pipe would stop them."""
        until, speaking = time.monotonic() + SAVING_S, set(self._workers)
        while speaking and (left := until - time.monotonic()) > 0:
            for connection in wait(list(speaking), left):
                assert isinstance(connection, Connection)
                try:
                    connection.recv()
                except (EOFError, OSError):
                    speaking.remove(connection)
        for worker in self._workers.values():
            worker.process.join(max(0.0, until - time.monotonic()))


class _Sent(Silent):
    """The progress of a cell, sent as messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, text: str) -> None:
        with suppress(OSError):
            self._connection.send(text)


def work(connection: Connection, slot: Slot, output: Path, recipe: Recipe) -> None:
    """Run the cells that come through a connection until there is None, in a process of its own."""
    os.setpgid(0, 0)  # Ctrl-C reaches the first process alone, which stops the others
    with suppress(RuntimeError):  # a system that refuses this thread refuses those of the cell, whose error says more
        threading.Thread(target=_follow_parent, daemon=True).start()
    if slot.gpu is not None:
        # Before the first CUDA call of this process, which reads it once.
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(slot.gpu)
    torch.set_num_threads(slot.threads)
    progress = _Sent(connection)
    outputs = SharedOutputs(output / FOLDER)
    resources = Resources(recipe, output, progress, outputs)
    # OSError: of the connection, when the first process is gone.
    with suppress(EOFError, OSError, Interrupted, KeyboardInterrupt):
        while (cell := connection.recv()) is not None:
            connection.send(None)
            try:
                reset_peak(accelerator().device)
                done = Done(run_cell(cell, output, resources, Within(progress, cell.name)))
            except Interrupted:  # the cell has not failed: its state is saved
                raise
            except RemapError as error:
                done = Done(failed=str(error))
            except Exception:
                done = Done(failed=traceback.format_exc())  # a fault of the code: its lines tell where
            outputs.release()  # a cell that failed may still hold the lock of outputs
            connection.send(done)


def _visible(gpu: int) -> str:
    """Return the name of a GPU by its number among those that the user made visible."""
    return names.split(",")[gpu] if (names := os.environ.get("CUDA_VISIBLE_DEVICES", "")) else str(gpu)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), 15)  # a parent that is killed sends no signal; by this one a run saves its state
