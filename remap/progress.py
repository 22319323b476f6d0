"""How long work reports itself. The library stays silent; a command passes a reporter that prints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Step(Protocol):
    """One wait that can be watched."""

    def advance(self, amount: int = 1, **values: float) -> None:
        """Count ``amount`` more units done; ``values`` (loss, accuracy) are shown beside the bar."""


class Progress(Protocol):
    """Where stages, waits and remarks go."""

    def say(self, text: str) -> None:
        """A remark worth a line: what was chosen, what was skipped."""

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        """Watch a wait of ``total`` units (None: unknown length)."""


class _SilentStep:
    def advance(self, amount: int = 1, **values: float) -> None:
        pass


class Silent:
    """The default: says nothing."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        yield _SilentStep()


class Within:
    """The progress of a part: all that it says begins with the part's name."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def say(self, text: str) -> None:
        self._progress.say(f"{self._name}: {text}")

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        with self._progress.wait(f"{self._name}: {what}", total) as step:
            yield step
