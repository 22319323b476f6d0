"""The check of a teacher against chance and the untrained student, before anything is trained."""

from functools import partial

import numpy as np

from remap.data import CLASSES, METRIC, MULTILABEL
from remap.data.views import ViewSource
from remap.engine.evaluation_pass import evaluate_as
from remap.engine.multilabel import base_rate
from remap.errors import TrainingError
from remap.io.human_size import number_of
from remap.pipeline.components import RunComponents
from remap.pipeline.computed_once import evaluate_once, measured
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.pipeline.teacher_tuning import title_of
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import WORDS
from remap.runs.interval import Measured, difference

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
        evaluate = partial(evaluate_as, recipe, student, views.val, progress, what)
        untrained = measured(evaluate_once(recipe, student, views, evaluate))
        require_all_useful(components, untrained)


def require_all_useful(components: RunComponents, untrained: Measured | None) -> None:
    """Call ``require_useful`` for each teacher."""
    for number, prepared in enumerate(components.teachers):
        # Settings of the command line are those of the first one, unless they name a number.
        allow = f"--set teacher{f'.{number + 1}' if number else ''}.allow_weak=true"
        require_useful(prepared, untrained, components.views.val, allow, title_of(prepared.spec, components.recipe))


def require_useful(
    teacher: PreparedTeacher,
    untrained: Measured | None,
    source: ViewSource,
    allow: str = "--set teacher.allow_weak=true",
    title: str = "the teacher",
) -> None:
    """Refuse a teacher whose accuracy, or mAP, is not clearly above chance, or clearly below the untrained student's.

    Chance is the share of the most frequent class, or the mAP of a ranking at random. "Clearly" is by 95% intervals
    (``computed_once.measured``, ``remap.runs.interval.difference``), which few images make wide; a teacher that is
    right on all images is never refused for chance, and one that is wrong anywhere has to be above it.

    Args:
        untrained: The untrained student's figure; None compares with chance alone, before the student is evaluated.
        allow, title: How a weak teacher is allowed, and how it is called, for the message.

    Raises:
        TrainingError: The teacher is too weak.
    """
    # A teacher without a head gives features only; there is nothing to compare.
    if teacher.accuracy is None or teacher.spec.allow_weak:
        return
    labels, count, metric = source.split.labels, len(source.split), METRIC[CLASSES]
    if labels.ndim == 2:
        metric, how, chance = METRIC[MULTILABEL], "a ranking at random", base_rate(labels)
    else:  # the most frequent class, not 1/C: classes may be imbalanced
        how, chance = "always naming the most frequent class", float(np.bincount(labels).max() / count)
    above = teacher.accuracy.low > chance or teacher.accuracy.value == 1.0
    # The upper end of the interval of teacher minus student.
    below = untrained is not None and difference(teacher.accuracy, untrained)[1] < 0
    if above and not below:
        return
    why = f"not clearly above chance ({how} gives {chance:.1%})"
    if above:
        why = f"clearly below the untrained student's {untrained}"
    images = number_of(count, "evaluation image")
    few = "judge it by more images (--val-data), " if count < FEW_IMAGES else ""
    raise TrainingError(
        f"{title}'s {metric} on {images} is {teacher.accuracy}: {why}",
        given=f"{teacher.network.identity.model}, head: {teacher.head}; in brackets 95% intervals",
        do=f"start a new run: {few}{_remedy(teacher)}\n           or allow it: {allow}",
    )


def _remedy(teacher: PreparedTeacher) -> str:
    """Return what has not been tried yet."""
    if teacher.head == "probe":
        return "tune it (--set teacher.prepare=full, or auto), choose another teacher or other weights,"
    if teacher.head == WORDS:
        return "find other words (--classes, --templates), choose another model,"
    if teacher.head != "its own":
        return "tune it for longer or at another rate (teacher.epochs, teacher.lr), choose another teacher or weights,"
    if is_run(teacher.spec.model):
        return "choose a better run,"
    return "let its head be fitted (--set teacher.prepare=probe, or full), choose another teacher or other weights,"
