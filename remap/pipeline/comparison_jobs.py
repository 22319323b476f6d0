"""How many cells of a comparison run at once, and where: by cores, GPUs and memory."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from remap.cache.shared_outputs import FOLDER
from remap.distributed.device_memory import free_bytes, peak_bytes, reset_peak
from remap.distributed.interrupts import watch_signals
from remap.distributed.launch import accelerator
from remap.errors import Interrupted, RemapError
from remap.io.human_size import number_of, size
from remap.pipeline.build_cache import prepared_components
from remap.pipeline.comparison_cells import Cell
from remap.pipeline.comparison_resources import AUTO, Resources
from remap.pipeline.comparison_workers import Pool, Slot, require_all, run_cell
from remap.pipeline.dry_run import estimate
from remap.pipeline.teacher_tuning import needs_logits
from remap.progress import CELLS, Progress, Silent

# Training steps of all cells below which starting processes takes longer than they save.
LEAST_STEPS = 1000
# Share of the free memory that cells may take, and bytes of a process besides what its cell needs.
MEMORY_SHARE, OVERHEAD = 0.8, 2**30


def run_cells(cells: Sequence[Cell], jobs: str, output: Path, resources: Resources, progress: Progress) -> None:
    """Run cells in their folders in ``output``, as many at once as ``jobs`` says (see ``read_jobs``).

    Raises:
        RunError: Some cells failed; all others are finished.
        RemapError: A teacher is too weak, or the first of cells that run one after the other failed.
    """
    steps = [resources.first.training_steps(cell.recipe) for cell in cells]
    most = len(cells) if jobs == AUTO else min(int(jobs), len(cells))
    if most == 1 or (jobs == AUTO and (sum(steps) < LEAST_STEPS or (cores() == 1 and not _gpus()))):
        _one_after_the_other(cells, steps, output, resources, progress)
        return
    prepare_teachers(cells, output, resources, progress)
    slots = auto_slots(cells, progress) if jobs == AUTO else slots_of(most)
    where = f", {number_of(len({slot.gpu for slot in slots}), 'GPU')}" if slots[0].gpu is not None else ""
    threads = number_of(slots[0].threads, "CPU thread")
    progress.say(f"{number_of(len(slots), 'cell')} side by side, {threads} each{where} (--jobs {jobs})")
    try:
        with watch_signals():
            Pool(slots, output, resources.recipe, progress).run(cells)
    finally:
        shutil.rmtree(output / FOLDER, ignore_errors=True)


def _one_after_the_other(
    cells: Sequence[Cell], steps: Sequence[int], output: Path, resources: Resources, progress: Progress
) -> None:
    failed: dict[str, str] = {}
    with progress.wait(CELLS, len(cells)) as shown:
        shown.advance(0, **{cell.name: math.nan for cell in cells})
        for number, cell in enumerate(cells, 1):
            progress.say(f"[{number}/{len(cells)}] {cell.name}")
            reset_peak(accelerator().device)  # each cell reports a peak of its own
            accuracy = math.nan
            try:
                accuracy = run_cell(cell, output, resources, progress, sum(steps[number:]))
            except Interrupted:
                raise
            except RemapError as error:
                if number == 1:  # its teacher, its images or the disk: most likely what the others need, too
                    raise
                progress.say(f"{cell.name} failed: {error}")
                failed[cell.name] = error.what
            shown.advance(1, **{cell.name: accuracy})
    require_all(failed, len(cells))


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slots_of(count: int) -> list[Slot]:
    """Divide cores and GPUs among ``count`` cells."""
    # No more threads than PyTorch has here, which the user may have limited.
    gpus, threads = _gpus(), max(1, min(cores() // count, torch.get_num_threads()))
    return [Slot(threads, index % gpus if gpus else None) for index in range(count)]


def auto_slots(cells: Sequence[Cell], progress: Progress) -> list[Slot]:
    """Return a slot for each core, or as many a GPU as its memory holds, up to the number of cells."""
    gpus = _gpus()
    if gpus:
        with progress.wait("estimating the memory of a cell"):
            # Cells with a teacher come first (``compare``): where there is one, this is such a cell.
            needed = estimate(cells[0].recipe, Silent())["estimate"]["memory_bytes"] + OVERHEAD
        free, most = torch.cuda.mem_get_info()[0], gpus * max(1, cores() // gpus)
    else:
        # Without a GPU the peak of this process, which prepared the teachers, stands for that of a cell.
        needed, free, most = peak_bytes(accelerator().device) + OVERHEAD, free_bytes(), cores()
    fitting = max(1, int(MEMORY_SHARE * free / needed)) * max(1, gpus)
    if fitting < min(most, len(cells)):
        progress.say(f"memory holds {number_of(fitting, 'cell')} at once: about {size(needed)} each, {size(free)} free")
    return slots_of(min(len(cells), most, fitting))


def _gpus() -> int:
    return torch.cuda.device_count() if accelerator().device.type == "cuda" else 0


def prepare_teachers(cells: Sequence[Cell], output: Path, resources: Resources, progress: Progress) -> None:
    """Prepare and judge each teacher once, where the processes of the cells find it."""
    # What a comparison left that was killed may be of other images.
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    # Reversed, so that of each folder the first cell stays: its seed prepares the teacher, as in one process. One whose
    # losses read logits, if there is any: for the others a teacher needs no head.
    taught = sorted((cell for cell in reversed(cells) if cell.with_teacher), key=lambda cell: needs_logits(cell.recipe))
    by_folder = {id(shared := resources.of(cell, output)): (cell, shared) for cell in taught}
    for cell, shared in by_folder.values():
        with prepared_components(cell.recipe.written_out(), progress, shared):
            pass
    for _, shared in by_folder.values():  # the processes read teachers from the disk, and decode images themselves
        shared.teachers.clear()
        shared.views.clear()
