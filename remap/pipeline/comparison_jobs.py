"""Run the cells of a comparison: one after the other, or side by side in processes that take cell after cell."""

import math
import multiprocessing
import os
import shutil
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
from remap.distributed.device_memory import peak_bytes, reset_peak
from remap.distributed.interrupts import watch_signals
from remap.distributed.launch import accelerator
from remap.errors import Interrupted, RemapError, RunError
from remap.io import links
from remap.io.human_size import size
from remap.pipeline.build_cache import prepared_components
from remap.pipeline.comparison_cells import Cell
from remap.pipeline.comparison_resources import AUTO, Resources
from remap.pipeline.dry_run import estimate
from remap.pipeline.run import run
from remap.progress import CELLS, Progress, Silent, Step, Within
from remap.recipe.schema import Recipe
from remap.runs.run_dir import RunDir

# Clean processes that have imported everything once. A fork of this one would inherit locks and the state of a GPU.
START_METHOD = "forkserver"
# Training steps of all cells below which starting processes takes longer than they save.
LEAST_STEPS = 1000
# Share of the free memory that cells may take, and bytes of a process besides what its cell needs.
MEMORY_SHARE, OVERHEAD = 0.8, 2**30
# Seconds that cells have for saving when the comparison is stopped.
SAVING_S = 600.0


@dataclass(frozen=True)
class Slot:
    """Where one cell after the other runs: CPU threads, and a GPU by its number."""

    threads: int
    gpu: int | None = None


def run_cells(cells: Sequence[Cell], jobs: str, output: Path, resources: Resources, progress: Progress) -> None:
    """Run cells in their folders in ``output``, as many at once as ``jobs`` says (see ``read_jobs``).

    Raises:
        RunError: Some cells failed; all others are finished.
        RemapError: A teacher is too weak, or a cell that runs alone failed.
    """
    steps = [resources.first.training_steps(cell.recipe) for cell in cells]
    most = len(cells) if jobs == AUTO else min(int(jobs), len(cells))
    if most == 1 or (jobs == AUTO and (sum(steps) < LEAST_STEPS or (cores() == 1 and not _gpus()))):
        with progress.wait(CELLS, len(cells)) as shown:
            shown.advance(0, **{cell.name: math.nan for cell in cells})
            for number, cell in enumerate(cells, 1):
                progress.say(f"[{number}/{len(cells)}] {cell.name}")
                reset_peak(accelerator().device)
                accuracy = run_cell(cell, output, resources, progress, sum(steps[number:]))
                shown.advance(1, **{cell.name: accuracy})
        return
    prepare_teachers(cells, output, resources, progress)
    slots = auto_slots(cells, progress) if jobs == AUTO else slots_of(most)
    where = f", {len({slot.gpu for slot in slots})} GPU(s)" if slots[0].gpu is not None else ""
    progress.say(f"{len(slots)} cells side by side, {slots[0].threads} CPU thread(s) each{where} (--jobs {jobs})")
    try:
        with watch_signals():
            _Pool(slots, output, resources.recipe, progress).run(cells)
    finally:
        shutil.rmtree(output / FOLDER, ignore_errors=True)


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slots_of(count: int) -> list[Slot]:
    """Divide cores and GPUs among ``count`` cells."""
    gpus, threads = _gpus(), max(1, min(cores() // count, torch.get_num_threads()))
    return [Slot(threads, index % gpus if gpus else None) for index in range(count)]


def auto_slots(cells: Sequence[Cell], progress: Progress) -> list[Slot]:
    """Return a slot for each core, or as many a GPU as its memory holds, up to the number of cells."""
    gpus = _gpus()
    if gpus:
        with progress.wait("estimating the memory of a cell"):
            needed = estimate(cells[0].recipe, Silent())["estimate"]["memory_bytes"] + OVERHEAD
        free, most = torch.cuda.mem_get_info()[0], gpus * max(1, cores() // gpus)
    else:
        needed, free, most = peak_bytes(accelerator().device) + OVERHEAD, _free_memory(), cores()
    fitting = max(1, int(MEMORY_SHARE * free / needed)) * max(1, gpus)
    if fitting < min(most, len(cells)):
        progress.say(f"memory holds {fitting} cells at once: about {size(needed)} each, {size(free)} free")
    return slots_of(min(len(cells), most, fitting))


def _gpus() -> int:
    return torch.cuda.device_count() if accelerator().device.type == "cuda" else 0


def _free_memory() -> int:
    with suppress(OSError):  # Linux
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run_cell(cell: Cell, output: Path, resources: Resources, progress: Progress, steps_after: int = 0) -> float:
    """Run one cell, or continue it from its checkpoint; return its student's accuracy."""
    path = output / cell.name
    links.require_no_link(path)
    shared = resources.of(cell, output)
    resuming = (path / "recipe.yaml").is_file()
    run_dir = RunDir.open(path) if resuming else RunDir.create(path, cell.recipe)
    found = run(cell.recipe, run_dir, progress, shared, resuming=resuming, steps_after=steps_after)
    return found.summary["student"]["accuracy"]


def prepare_teachers(cells: Sequence[Cell], output: Path, resources: Resources, progress: Progress) -> None:
    """Prepare and judge each teacher once, where the processes of the cells find it."""
    by_folder = {id(resources.of(cell, output)): cell for cell in reversed(cells) if cell.with_teacher}
    for cell in by_folder.values():
        with prepared_components(cell.recipe.written_out(), progress, resources.of(cell, output)):
            pass


def require_all(failed: Mapping[str, str], count: int) -> None:
    """Raise a RunError if any of so many cells failed; ``failed`` holds the reasons by name."""
    if failed:
        name, reason = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of {count} cells failed; the others are finished",
            given=f"{', '.join(failed)}; {name}: {reason}",
            do="start the same comparison again: finished cells are not run again",
        )


class _Pool:
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
                for connection in wait(list(self._running)):
                    assert isinstance(connection, Connection)
                    self._hear(connection, shown)
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
                with suppress(OSError):
                    process.terminate() if cell else connection.send(None)
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
