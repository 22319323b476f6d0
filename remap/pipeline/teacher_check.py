"""The check of a teacher against chance and the untrained student, before anything is trained."""

from functools import partial

import numpy as np

from remap.data.views import ViewSource
from remap.distributed.launch import accelerator
from remap.engine.evaluate import evaluate_as
from remap.engine.multilabel import base_rate
from remap.errors import TrainingError
from remap.pipeline.components import RunComponents
from remap.pipeline.judged import evaluate_once
from remap.pipeline.teachers import PreparedTeacher
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import WORDS
from remap.runs.interval import difference, wilson, with_interval

# Below so many images, intervals are so wide that a message says what to do about it.
FEW_IMAGES = 100


def check_teachers(components: RunComponents, progress: Progress) -> None:
    """Refuse weak teachers as a run does, for work that comes before the run, or without one.

    Raises:
        TrainingError: See ``require_useful``.
    """
    # Chance first: for that, the student need not be evaluated.
    require_all_useful(components, None)
    # The untrained student is evaluated only where a teacher will be compared with it.
    if any(prepared.accuracy is not None and not prepared.spec.allow_weak for prepared in components.teachers):
        recipe, views, what = components.recipe, components.views, "the network before training"
        student = components.student
        evaluate = partial(evaluate_as, recipe, student, views.val, accelerator(), progress, what)
        untrained = evaluate_once(recipe, student, views, evaluate).merit
        require_all_useful(components, untrained)


def require_all_useful(components: RunComponents, untrained: float | None) -> None:
    """Call ``require_useful`` for each teacher."""
    for prepared in components.teachers:
        require_useful(prepared, untrained, components.views.val)


def require_useful(teacher: PreparedTeacher, untrained: float | None, source: ViewSource) -> None:
    """Refuse a teacher whose accuracy is not clearly above chance, or clearly below the untrained student's.

    Chance is the share of the most frequent class. "Clearly" is by 95% intervals (Wilson, Newcombe), which few images
    make wide; a teacher that is right on all images is never refused for chance, and one that is wrong anywhere has to
    be above it. A mean average precision has no such interval: it has to be above that of chance, and not below the
    untrained student's.

    Args:
        untrained: The untrained student's accuracy; None compares with chance alone, before the student is evaluated.

    Raises:
        TrainingError: The teacher is too weak.
    """
    # A teacher without a head gives features only; there is nothing to compare.
    if teacher.accuracy is None or teacher.spec.allow_weak:
        return
    count = len(source.split)
    if source.split.labels.ndim == 2:
        _require_precise(teacher, untrained or 0.0, base_rate(source.split.labels), count)
        return
    # The most frequent class, not 1/C: classes may be imbalanced.
    chance = np.bincount(source.split.labels).max() / count
    above = wilson(teacher.accuracy, count)[0] > chance or teacher.accuracy == 1.0
    # The upper end of the interval of teacher minus student.
    below = untrained is not None and difference(teacher.accuracy, untrained, count)[1] < 0
    if above and not below:
        return
    why = f"not clearly above chance (always naming the most frequent class gives {chance:.1%})"
    if above and untrained is not None:
        why = f"clearly below the untrained student's {with_interval(untrained, count)}"
    images = "one evaluation image" if count == 1 else f"{count} evaluation images"
    few = "judge it by more images (--val-data), " if count < FEW_IMAGES else ""
    raise TrainingError(
        f"the teacher's accuracy on {images} is {with_interval(teacher.accuracy, count)}: {why}",
        given=f"{teacher.network.identity.model}, head: {teacher.head}; in brackets 95% intervals",
        do=f"start a new run: {few}{_remedy(teacher)}\n           or allow it: --set teacher.allow_weak=true",
    )


def _require_precise(teacher: PreparedTeacher, untrained: float, chance: float, count: int) -> None:
    assert teacher.accuracy is not None
    least, of = max(
        (chance, "of chance (the mean share of images of a class)"), (untrained, "of the untrained student")
    )
    if teacher.accuracy <= chance or teacher.accuracy < untrained:
        raise TrainingError(
            f"the teacher's mAP on {count} evaluation images is {teacher.accuracy:.1%}; that {of} is {least:.1%}",
            given=f"{teacher.network.identity.model}, head: {teacher.head}",
            do=f"start a new run: {_remedy(teacher)}\n           or allow it: --set teacher.allow_weak=true",
        )


def _remedy(teacher: PreparedTeacher) -> str:
    """Return what has not been tried yet."""
    if teacher.head == "probe":
        return "tune all of it (--set teacher.prepare=full), choose another teacher or other weights,"
    if teacher.head == WORDS:
        return "find other words (--classes, --templates), choose another model,"
    if teacher.head != "its own":
        return "tune it for longer or at another rate (teacher.epochs, teacher.lr), choose another teacher or weights,"
    if is_run(teacher.spec.model):
        return "choose a better run,"
    return "let its head be fitted (--set teacher.prepare=probe, or full), choose another teacher or other weights,"
