"""The check of a teacher against chance, before it teaches."""

from math import sqrt

import numpy as np

from remap.data.views import ViewSource
from remap.errors import TrainingError
from remap.pipeline.teachers import PreparedTeacher
from remap.recipe.paths import is_run


def require_useful(teacher: PreparedTeacher, untrained: float, source: ViewSource) -> None:
    """Refuse a teacher whose accuracy is not clearly above chance, or is below the untrained student's.

    Chance is the share p of the most frequent class among n images. The teacher must be better by two standard errors,
    sqrt(p (1 - p) / n); where images are so few that this bound is 1 or above, it must be right on all of them.

    Args:
        untrained: The untrained student's accuracy.

    Raises:
        TrainingError: It does not, or its accuracy is below the untrained student's.
    """
    # A teacher without a head gives features only; there is nothing to compare.
    if teacher.accuracy is None or teacher.spec.allow_weak:
        return
    count = len(source.split)
    # The most frequent class, not 1/C: classes may be imbalanced.
    chance = np.bincount(source.split.labels).max() / count
    bound = min(chance + 2 * sqrt(chance * (1 - chance) / count), 1 - 0.5 / count)
    if teacher.accuracy > bound and teacher.accuracy >= untrained:
        return
    why = (
        f"below the untrained student's {untrained:.1%}"
        if teacher.accuracy > bound
        else f"not clearly above chance (always naming the most frequent class gives {chance:.1%}; "
        f"on {'one image' if count == 1 else f'{count} images'}, luck alone may reach {bound:.1%})"
    )
    raise TrainingError(
        f"the teacher's accuracy on the evaluation images is {teacher.accuracy:.1%}: {why}",
        given=f"{teacher.network.identity.model}, head: {teacher.head}",
        do=f"start a new run: {_remedy(teacher)}\n           or allow it: --set teacher.allow_weak=true",
    )


def _remedy(teacher: PreparedTeacher) -> str:
    """Return what has not been tried yet."""
    if teacher.head == "probe":
        return "tune all of it (--set teacher.prepare=full), choose another teacher or other weights,"
    if teacher.head != "its own":
        return "tune it for longer or at another rate (teacher.epochs, teacher.lr), choose another teacher or weights,"
    if is_run(teacher.spec.model):
        return "choose a better run,"
    return "let its head be fitted (--set teacher.prepare=probe, or full), choose another teacher or other weights,"
