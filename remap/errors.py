"""Errors a user can cause. Each says what was wrong, what was given, what is allowed and what to do."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Letters in a line of a message. Of a long list no name is broken, and its lines begin below each other.
LINE = 118
_HANGING: dict[str, Any] = {"subsequent_indent": " " * 11, "break_long_words": False, "break_on_hyphens": False}


class RemapError(Exception):
    """An error that the user can fix; commands print it without a traceback and exit with ``exit_code``.

    Args:
        what: One sentence: what was wrong.
        given: The offending value, as the user wrote it.
        allowed: What would have been accepted.
        do: The next step, a command where there is one.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        given: object = None,
        allowed: Iterable[object] | str | None = None,
        do: str | None = None,
    ) -> None:
        self.what, self.given, self.do = what, given, do
        self.allowed = allowed if allowed is None or isinstance(allowed, str) else ", ".join(map(str, allowed))
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what]
        if self.given is not None:
            lines.append(f"  given:   {self.given}")
        if self.allowed is not None:
            lines.append(textwrap.fill(f"  allowed: {self.allowed}", LINE, **_HANGING))
        if self.do is not None:
            lines.append(f"  do:      {self.do}")
        return "\n".join(lines)


@contextmanager
def naming(path: object, temporary: object) -> Iterator[None]:
    """Name a path that the user knows in errors of the block, in place of the temporary one that stands for it."""
    try:
        yield
    except RemapError as error:
        error.what = error.what.replace(str(temporary), str(path))
        if error.given is not None:
            error.given = str(error.given).replace(str(temporary), str(path))
        error.args = (error._text(),)
        raise


class RemapWarning(UserWarning):
    """Something that a user should know and that stops nothing; the command line prints it as a remark."""


class UnknownName(RemapError):
    """A method, loss, model or recipe of that name does not exist."""


class RecipeError(RemapError):
    """Everything that is wrong with a recipe, at once.

    Args:
        problems: One line each, "key: problem".
        where: The file or command line the recipe came from.
        do: The next step.
    """

    def __init__(self, problems: Sequence[str], where: str, do: str | None = None) -> None:
        self.problems, self.where = tuple(problems), where
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        what = "\n".join([f"{where}: {count}", *map(_item, self.problems)])
        RemapError.__init__(self, what, do=do)


def _item(problem: str) -> str:
    """Return a line of a list, or several where it names all methods."""
    line = f"  - {problem}"
    return line if len(line) <= 2 * LINE else textwrap.fill(line, LINE, **{**_HANGING, "subsequent_indent": " " * 4})


class PluginError(RemapError):
    """Another package's method, loss or data source cannot be registered or loaded."""


class BackboneError(RemapError):
    """A model cannot be built, or lacks a part that is needed."""


class WeightsError(RemapError):
    """Weights are missing, cannot be downloaded, or do not fit."""


class DataError(RemapError):
    """Images, classes or splits cannot be used."""


class MissingData(DataError):
    """There are no images at the given path."""


class RunError(RemapError):
    """A run directory, checkpoint or task file does not fit the command."""


class DiskFull(RunError):
    """There is not enough space for a file; files written earlier are complete."""


class ThreadRefused(RunError):
    """The system starts no more threads for this process."""


MORE_THREADS = (
    "end other programs, raise the limit of processes (ulimit -u, or that of the container), or decode with fewer"
    " threads (--set data.workers=1)"
)


def refused_thread(error: BaseException) -> ThreadRefused | None:
    """Return an error with what to do where Python, in anybody's code, could not start a thread; else None."""
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return ThreadRefused("the system refuses to start another thread", do=MORE_THREADS)
    return None


@contextmanager
def starting_threads() -> Iterator[None]:
    """Raise what ``refused_thread`` returns where the block cannot start a thread."""
    try:
        yield
    except RuntimeError as error:
        if (refused := refused_thread(error)) is not None:
            raise refused from error
        raise


class TrainingError(RemapError):
    """Training had to stop: a loss that is not finite, a teacher at chance level."""


class Interrupted(RemapError):
    """A signal asked the run to stop.

    Args:
        at_once: It was the second signal: exit without saving.
    """

    def __init__(self, what: str, *, exit_code: int = 130, do: str | None = None, at_once: bool = False) -> None:
        super().__init__(what, do=do)
        self.exit_code, self.at_once = exit_code, at_once

    def add(self, what: str) -> None:
        """Add a clause to the message."""
        self.what = f"{self.what}; {what}"


def is_at_once(error: BaseException) -> bool:
    """Return whether a second signal raised an error: nothing is saved, and no process is waited for."""
    return isinstance(error, Interrupted) and error.at_once
