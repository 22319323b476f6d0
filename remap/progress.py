"""Reports of progress. The library prints nothing; a command passes a reporter that does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Step(Protocol):
    """One piece of work whose progress is shown."""

    def advance(self, amount: int = 1, **values: float) -> None:
        """Count ``amount`` more units as done; ``values`` (loss, accuracy) are shown next to the bar."""


class Progress(Protocol):
    """Receives messages and the progress of long work."""

    def say(self, text: str) -> None:
        """Report one line: what was chosen, what was skipped."""

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        """Show the progress of ``total`` units (None: unknown length)."""


class _SilentStep:
    def advance(self, amount: int = 1, **values: float) -> None:
        pass


class Silent:
    """The default: reports nothing."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        yield _SilentStep()


class Within:
    """The progress of one component: every line begins with its name."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def say(self, text: str) -> None:
        self._progress.say(f"{self._name}: {text}")

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        with self._progress.wait(f"{self._name}: {what}", total) as step:
            yield step
