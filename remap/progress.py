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
