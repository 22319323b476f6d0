"""The sessions of a run that extends others: their runs and images, and what the newest answers on each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remap.data.views import ViewSource
from remap.distributed.launch import ProcessLost
from remap.engine.evaluation import Evaluation
from remap.engine.evaluation_pass import evaluate_as
from remap.engine.metrics import calibration_error
from remap.errors import DataError, RemapError, RunError
from remap.io.paths import absolute, expanded
from remap.pipeline.components import RunComponents
from remap.pipeline.data_views import DataViews
from remap.pipeline.shared import SharedResources
from remap.progress import Progress
from remap.recipe.schema import DataSpec
from remap.runs import class_statistics
from remap.runs.run_dir import RunDir
from remap.runs.session_figures import figures, is_matrix
from remap.runs.task import LONGEST_CHAIN
from remap.runs.task_file import folder_of, read_meta

# A chain of sessions is read as far as this.
MOST_SESSIONS = 64 * LONGEST_CHAIN


@dataclass(frozen=True)
class Session:
    """One run of a chain; ``classes`` are those its student knows."""

    run: RunDir
    classes: tuple[str, ...]


def sessions_of(path: Path) -> list[Session]:
    """Return the runs that a run extends, and itself last.

    Raises:
        RunError: One is not there, or they go in a circle.
    """
    found: list[Session] = []
    step: str | None = str(path)
    while step is not None:
        run = RunDir.open(Path(absolute(expanded(step))))
        if any(run.path == one.run.path for one in found) or len(found) >= MOST_SESSIONS:
            raise RunError(f"{run.path} extends an endless chain of runs")
        found.append(Session(run, read_meta(folder_of(run.path)).classes))
        step = run.recipe().student.extends
    return found[::-1]


def images_of(
    session: Session, classes: tuple[str, ...], components: RunComponents, shared: SharedResources, progress: Progress
) -> DataViews:
    """Open the images of an earlier session as the student sees them, with labels by the student's classes.

    Raises:
        MissingData: They are not at hand.
    """
    return shared.open(_data_of(session, classes), components.views.view, progress)


def _data_of(session: Session, classes: tuple[str, ...]) -> DataSpec:
    # Labels count in the student's classes; a memory adds no evaluation images, and its file may be gone.
    update = {"known_classes": classes, "memory": None, "augment": "none"}
    return session.run.recipe().data.labeled_part().model_copy(update=update)


def measure_sessions(
    components: RunComponents,
    run_dir: RunDir,
    before: float | None,
    own: Evaluation | None,
    shared: SharedResources,
    progress: Progress,
) -> dict[str, Any]:
    """Return what the student answers on the evaluation images of each session, and the figures of the whole chain.

    Args:
        before: The accuracy on the new images before they were learned.
        own: What the student answers on them.

    Returns:
        Nothing where the run extends no other; else under "sessions": sessions (run, classes, images, and the bytes
        that are there by now), accuracy (see ``remap.runs.session_figures``), its figures, overall (over all images),
        and calibration_error of old and of new images.
    """
    recipe, classes = components.recipe, components.student.classes or ()
    if recipe.student.extends is None or own is None:
        return {}
    earlier = sessions_of(expanded(recipe.student.extends))
    answers: list[tuple[Evaluation, np.ndarray] | None] = []
    for session in earlier:
        try:
            spec = _data_of(session, classes)  # the training images need not be decoded
            # Read once, so not held in memory beside the images that are learned from.
            val = ViewSource(shared.index(spec).val, components.views.view, memory_bytes=0.0, workers=spec.workers)
            what = f"session {len(answers) + 1}"
            answered = evaluate_as(recipe, components.student, val, progress, what)
        except (DataError, ProcessLost) as error:  # here or on another process; what was trained is not lost over them
            why = error.what if error.given is None else f"{error.what}: {error.given}"
            progress.say(f"the images of {session.run.path} cannot be used, so it is not measured: {why}")
            answers.append(None)
            continue
        answers.append((answered, val.split.labels))
    answers.append((own, components.views.val.split.labels))
    same_classes, matrix = earlier[-1].classes == classes, _before(earlier)
    if same_classes:
        # The run before was measured on these images before training: one column more, for forward transfer.
        matrix[-1] = [*matrix[-1][: len(earlier)], before]
    matrix = [*matrix, [None if one is None else one[0].accuracy for one in answers]]
    known = [one for one in answers if one is not None]
    count = sum(one.count for one, _ in known)
    listed = [*earlier, Session(run_dir, classes)]
    rows = [
        {
            "run": str(session.run.path),
            # A student knows all classes up to its session: here are those that it added.
            "classes": [name for name in session.classes if number == 0 or name not in listed[number - 1].classes],
            "images": None if one is None else one[0].count,
            "bytes": bytes_of(session.run),
        }
        for number, (session, one) in enumerate(zip(listed, answers, strict=True))
    ]
    found = {
        "sessions": rows,
        "accuracy": matrix,
        **figures(matrix, same_classes=same_classes),
        "overall": sum(one.correct for one, _ in known) / count if count else None,
        "calibration_error": {"old": _calibration(answers[:-1]), "new": _calibration(answers[-1:])},
    }
    return {"sessions": found}


def _before(earlier: list[Session]) -> list[list[float | None]]:
    """Return the rows of the matrix up to the run before."""
    try:
        summary = earlier[-1].run.summary()
        matrix = summary["sessions"]["accuracy"] if "sessions" in summary else [[summary["student"]["accuracy"]]]
    except (RemapError, KeyError, TypeError):  # damage to an earlier run must not cost the figures of this one
        matrix = None
    if matrix is not None and is_matrix(matrix) and len(matrix) == len(earlier):
        return list(matrix)
    return [[None] * (number + 1) for number in range(len(earlier))]


def _calibration(answers: list[tuple[Evaluation, np.ndarray] | None]) -> float | None:
    seen = [(one.confidences_N, one.predictions_N, labels) for one, labels in filter(None, answers)]
    if not seen:
        return None
    confidences_N, predictions_N, labels_N = (np.concatenate(rows) for rows in zip(*seen, strict=True))
    # -1 stands for an image that was left out.
    readable_N = predictions_N >= 0
    if not readable_N.any():
        return None
    return calibration_error(confidences_N[readable_N], (predictions_N == labels_N)[readable_N])


def bytes_of(run: RunDir) -> int:
    """Return what a session has to keep: its task, and statistics where there are any."""
    files = [*run.task.glob("task.*"), run.path / class_statistics.FILE]
    return sum(file.stat().st_size for file in files if file.is_file())
