"""What a run leaves when it is trained: metrics, the tuned student and the summary."""

import shutil
from collections.abc import Callable
from typing import Any, TypeVar

from remap.backbones.model_folder import is_known_to_timm, save_model_folder
from remap.distributed.launch import accelerator
from remap.engine.job import Job, bytes_of_a_run
from remap.engine.state import State
from remap.errors import BackboneError
from remap.io import disk_space
from remap.pipeline.components import RunComponents
from remap.pipeline.run_status import RunClock
from remap.pipeline.sessions import bytes_of
from remap.progress import Progress
from remap.recipe.schema import ModelSpec
from remap.remapping.architecture.shrink import Shape
from remap.runs.run_dir import RunDir
from remap.runs.task import open_backbone, save_task

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
    missing = max(0, bytes_of_a_run(job.student, job.objective, job.teachers, job.recipe.train) - written)
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

    Of a student without a classifier, the backbone is a model folder of timm besides.

    Args:
        summary: Gets its last entries here: the student's bytes and the seconds of the run.
        fitting: Seconds of this part that were training.
    """

    def write(action: Callable[[], T]) -> T:
        return _patiently(action, progress)

    method, view = components.recipe.method, components.views.view
    write(lambda: run_dir.write_metrics(state.history))
    summary["student"]["task_bytes"] = write(
        lambda: save_task(run_dir.task, components.student, view, method.name, method.options)
    )
    if "sessions" in summary:  # counted before the task was there, or with one that a killed end of this run wrote
        summary["sessions"]["sessions"][-1]["bytes"] = bytes_of(run_dir)
    if components.recipe.label_free:
        mergeable = components.student.attached.mergeable
        summary["student"]["backbone"] = write(lambda: save_backbone(run_dir, progress)) if mergeable else None
    # A part that was killed recorded less time than its checkpoint knows.
    known = clock.here - fitting + state.seconds
    summary["seconds"] = clock.reported = round(max(clock.seconds, known), 2)
    # Last: a summary means that everything else is there.
    write(lambda: run_dir.write_summary(summary))


def write_summary(run_dir: RunDir, summary: dict[str, Any], clock: RunClock, progress: Progress) -> None:
    """Write the summary once more, with what was added after the student was written; its seconds go on to now."""
    summary["seconds"] = clock.reported = round(max(clock.seconds, summary["seconds"]), 2)
    _patiently(lambda: run_dir.write_summary(summary), progress)


def _patiently(action: Callable[[], T], progress: Progress) -> T:
    """Write; a full disk is waited for."""
    patience = PATIENCE_ALONE if accelerator().num_processes == 1 else PATIENCE_TOGETHER
    return disk_space.retry_until_room(action, patience, progress.say)


def save_backbone(run_dir: RunDir, progress: Progress) -> str | None:
    """Write the tuned backbone as a model folder of timm.

    Returns:
        Its path; None where timm cannot build this function, which is said: the task holds the student all the same.
    """
    # From the task, so that the run's own student stays as it is.
    backbone = open_backbone(ModelSpec(model=str(run_dir.path)), 0)
    model, anatomy = backbone.model.eval(), backbone.anatomy
    shape = {} if is_known_to_timm(model) else Shape.of(anatomy).arguments(anatomy)
    shutil.rmtree(run_dir.backbone, ignore_errors=True)  # of an interrupted or damaged end of this run
    try:
        save_model_folder(model, run_dir.backbone, shape)
    except BackboneError as error:
        progress.say(f"there is no model folder of the backbone: {error.what} ({error.given})")
        return None
    return str(run_dir.backbone)
