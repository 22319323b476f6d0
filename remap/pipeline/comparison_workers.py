"""Cells of a comparison side by side, in processes that take cell after cell."""

import math
import multiprocessing
import os
import threading
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
# Seconds that cells have for saving when the comparison is stopped.
SAVING_S = 600.0


@dataclass(frozen=True)
class Slot:
    """Where one cell after the other runs: CPU threads, and a GPU by its number."""

    threads: int
    gpu: int | None = None


def run_cell(cell: Cell, output: Path, resources: Resources, progress: Progress, steps_after: int = 0) -> float:
    """Run one cell, or continue it from its checkpoint; return its student's accuracy."""
    path = output / cell.name
    links.require_no_link(path)
    shared = resources.of(cell, output)
    resuming = (path / "recipe.yaml").is_file()
    run_dir = RunDir.open(path) if resuming else RunDir.create(path, cell.recipe)
    found = run(cell.recipe, run_dir, progress, shared, resuming=resuming, steps_after=steps_after)
    return found.summary["student"]["accuracy"]


def require_all(failed: Mapping[str, str], count: int) -> None:
    """Raise a RunError if any of so many cells failed; ``failed`` holds the reasons by name."""
    if failed:
        name, reason = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {count} cells failed; the others are finished",
            given=f"{', '.join(failed)}; {name}: {reason}",
            do="start the same comparison again: finished cells are not run again",
        )


class Pool:
    """Processes, one a slot, and the cells that wait."""

    def __init__(self, slots: Sequence[Slot], output: Path, recipe: Recipe, progress: Progress) -> None:
        self._free, self._output, self._recipe, self._progress = list(slots), output, recipe, progress
        self._context: Any = multiprocessing.get_context(START_METHOD)
        if START_METHOD == "forkserver":
            self._context.set_forkserver_preload([__name__])
        self._running: dict[Connection, tuple[Any, Slot, Cell | None]] = {}
        self._failed: dict[str, str] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        waiting = list(reversed(cells))
        with self._progress.wait(CELLS, len(cells)) as shown, self._ended():
            shown.advance(0, **{cell.name: math.nan for cell in cells})
            while waiting or any(cell for _, _, cell in self._running.values()):
                while self._free and waiting:
                    self._start(self._free.pop(0))
                for connection, (process, slot, cell) in list(self._running.items()):
                    if cell is None and waiting:
                        cell = waiting.pop()
                        self._running[connection] = (process, slot, cell)
                        self._progress.say(f"[{len(cells) - len(waiting)}/{len(cells)}] {cell.name}")
                        shown.advance(0, **{cell.name: math.inf})
                        with suppress(OSError):  # it has died, which the next look finds
                            connection.send(cell)
                for heard in wait(list(self._running)):
                    assert isinstance(heard, Connection)
                    self._hear(heard, shown)
        require_all(self._failed, len(cells))

    def _start(self, slot: Slot) -> None:
        ours, theirs = self._context.Pipe()
        words = (theirs, slot, self._output, self._recipe)
        process = self._context.Process(target=work, args=words, daemon=False)
        process.start()
        theirs.close()
        self._running[ours] = (process, slot, None)

    def _hear(self, connection: Connection, shown: Step) -> None:
        """Take one message: (text, None), (None, accuracy) of a cell that is done, or (error, NaN)."""
        process, slot, cell = self._running[connection]
        try:
            text, accuracy = connection.recv()
        except (EOFError, OSError):
            process.join()
            del self._running[connection]
            self._free.append(slot)
            hint = "; the system kills processes when memory runs out" if process.exitcode == -9 else ""
            text, accuracy = f"its process ended with exit code {process.exitcode}{hint}", math.nan
        else:
            if accuracy is None:
                self._progress.say(text)
                return
            self._running[connection] = (process, slot, None)
        if cell is None:
            return
        if text is not None:
            self._failed[cell.name] = text
            self._progress.say(f"{cell.name} failed: {text}")
        shown.advance(1, **{cell.name: accuracy})

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """End all processes; cells that are stopped save their state first."""
        try:
            yield
        finally:
            for connection, (process, _, cell) in self._running.items():
                if cell is not None:
                    process.terminate()
                else:
                    with suppress(OSError):
                        connection.send(None)
            try:
                for process, *_ in self._running.values():
                    process.join(SAVING_S)
            finally:  # a second signal
                for process, *_ in self._running.values():
                    process.kill()


class _Sent(Silent):
    """The progress of a cell, sent as messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, text: str) -> None:
        with suppress(OSError):
            self._connection.send((text, None))


def work(connection: Connection, slot: Slot, output: Path, recipe: Recipe) -> None:
    """Run the cells that come through a connection until there is None, in a process of its own."""
    os.setpgid(0, 0)  # Ctrl-C reaches the first process alone, which stops the others
    threading.Thread(target=_follow_parent, daemon=True).start()
    if slot.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(slot.gpu)
    torch.set_num_threads(slot.threads)
    progress = _Sent(connection)
    outputs = SharedOutputs(output / FOLDER)
    resources = Resources(recipe, output, progress, outputs)
    with suppress(EOFError, Interrupted, KeyboardInterrupt):
        while (cell := connection.recv()) is not None:
            reset_peak(accelerator().device)
            try:
                answer: tuple[str | None, float] = (
                    None,
                    run_cell(cell, output, resources, Within(progress, cell.name)),
                )
            except Interrupted:
                raise
            except RemapError as error:
                answer = (str(error), math.nan)
            except Exception:
                answer = (traceback.format_exc(), math.nan)
            outputs.release()
            connection.send(answer)


def _visible(gpu: int) -> str:
    """Return the name of a GPU by its number among those that the user made visible."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return names.split(",")[gpu] if names else str(gpu)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), 15)
