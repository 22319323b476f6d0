"""What a run leaves when it is trained: metrics, the tuned student and the summary."""

from collections.abc import Callable
from typing import Any, TypeVar

from remap.distributed.launch import accelerator
from remap.engine.job import Job, bytes_of_a_run
from remap.engine.state import State
from remap.io import disk_space
from remap.pipeline.components import RunComponents
from remap.pipeline.run_status import RunClock
from remap.progress import Progress
from remap.runs.run_dir import RunDir
from remap.runs.task import save_task

# Seconds to wait for room on a full disk; shorter where other processes wait too.
PATIENCE_ALONE, PATIENCE_TOGETHER = 3600.0, 300.0
T = TypeVar("T")


def require_space(run_dir: RunDir, job: Job) -> None:
    """Refuse to train where checkpoints and the tuned student would not fit on the disk.

    Raises:
        DiskFull: There is too little room; nothing was trained.
    """
    # A resumed run already has most of what it needs.
    written = sum(path.stat().st_size for path in run_dir.checkpoint.glob("*"))
    missing = max(0, bytes_of_a_run(job.student, job.objective, job.teachers) - written)
    disk_space.require_space(run_dir.path, missing, "its checkpoints and the tuned student")


def write_results(
    components: RunComponents,
    run_dir: RunDir,
    summary: dict[str, Any],
    state: State,
    clock: RunClock,
    fitting: float,
    progress: Progress,
) -> None:
    """Write metrics, the tuned student and the summary, in this order; a full disk is waited for.

    Args:
        summary: Gets its last entries here: the student's bytes and the seconds of the run.
        fitting: Seconds of this part that were training.
    """
    patience = PATIENCE_ALONE if accelerator().num_processes == 1 else PATIENCE_TOGETHER

    def write(action: Callable[[], T]) -> T:
        return disk_space.retry_until_room(action, patience, progress.say)

    method, view = components.recipe.method, components.views.view
    write(lambda: run_dir.write_metrics(state.history))
    summary["student"]["task_bytes"] = write(
        lambda: save_task(run_dir.task, components.student, view, method.name, method.options)
    )
    # A part that was killed recorded less time than its checkpoint knows.
    known = clock.here - fitting + state.seconds
    summary["seconds"] = clock.reported = round(max(clock.seconds, known), 2)
    # Last: a summary means that everything else is there.
    write(lambda: run_dir.write_summary(summary))
