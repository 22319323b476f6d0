"""A teacher that its student has overtaken loses weight."""

from math import sqrt

from remap.engine.job import Job
from remap.engine.state import State


def share_left(student: float, teacher: float, images: int) -> float:
    """Return the share of its weight that a teacher keeps, from 1 to 0.

    1 while the student's accuracy s is not above the teacher's t, 0 from two standard errors of their difference on,
    and linear between. The standard error is that of two independent shares of n images,
    sqrt((s (1 - s) + t (1 - t)) / n).
    """
    ahead = student - teacher
    error = sqrt((student * (1 - student) + teacher * (1 - teacher)) / images)
    # Accuracies of 0 and 1 alone have no error: any lead counts.
    return 1.0 if ahead <= 0 else max(0.0, 1.0 - ahead / (2 * error)) if error else 0.0


def compare_with_teachers(job: Job, state: State, accuracy: float, epochs: int) -> None:
    """Take weight from the teachers that a student of this accuracy has overtaken; none gets any back.

    Args:
        epochs: How many it was trained for.
    """
    for number, teacher in job.may_be_overtaken.items():
        # Strings, as keys of JSON are.
        before = state.teacher_shares.get(str(number), 1.0)
        share = min(before, share_left(accuracy, teacher, job.evaluation_images))
        if share < before:
            state.teacher_shares[str(number)] = share
            state.overtaken.setdefault(str(number), epochs)  # the first time only: its share may fall further
            job.progress.say(
                f"the teacher is overtaken on the evaluation images ({teacher:.1%} against {accuracy:.1%}): "
                + (f"its losses keep {share:.0%} of their weight" if share else "its losses count no more")
            )
