"""A run inside another one that tunes its teacher, or tries a way to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from remap.pipeline.shared import SharedResources
from remap.progress import Progress, Step, Within
from remap.recipe.schema import Recipe
from remap.runs.run_dir import RunDir


class OfTeacher(Within):
    """The progress of a run that tunes a teacher, which is the student there."""

    def say(self, text: str) -> None:
        super().say(_of_teacher(text))

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        with super().wait(_of_teacher(what), total) as step:
            yield step


def _of_teacher(text: str) -> str:
    return text.replace("the student", "the teacher")


class OfTrial(OfTeacher):
    """The progress of a trial, which shows how far it is; what it came to is said by ``preparation_trials``."""

    def say(self, text: str) -> None:
        pass


class TeacherRun(NamedTuple):
    """What is to be run.

    Attributes:
        title: How messages call it.
        is_trial: Whether its result is a figure, and not the teacher.
    """

    title: str
    run_dir: RunDir
    recipe: Recipe
    is_trial: bool = False

    def shares(self, shared: SharedResources) -> SharedResources:
        """Return what it shares with the run; what a trial would say of the images is left for that to say."""
        return replace(shared, said=set()) if self.is_trial else shared

    def heard_by(self, progress: Progress) -> Progress:
        """Return the progress that it reports to."""
        return OfTrial(progress, self.title) if self.is_trial else OfTeacher(progress, self.title)
