"""Reports of progress. The library prints nothing; a command passes a reporter that does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# A wait of this name counts the runs of a comparison: its values are their accuracies by name, NaN until one is done.
CELLS = "cells"


class Step(Protocol):
    """One piece of work whose progress is shown."""

    def advance(self, amount: int = 1, **values: float) -> None:
        """Count ``amount`` more units as done; ``values`` (losses, learning rate) are shown below the bars."""


class Progress(Protocol):
    """Receives messages and the progress of long work."""

    def say(self, text: str) -> None:
        """Report one line: what was chosen, what was skipped."""

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        """Show the progress of ``total`` units (None: unknown length)."""


class Pace:
    """How fast the steps of a run are since this was made, with what is done between them."""

    def __init__(self) -> None:
        self._began, self._steps = time.perf_counter(), 0

    def after_step(self, images: int, steps_left: int) -> dict[str, float]:
        """Count a step of so many images; return images a second, and the seconds that are left at this pace."""
        self._steps += 1
        seconds = (time.perf_counter() - self._began) / self._steps
        return {"images/s": images / max(seconds, 1e-9), "left": seconds * steps_left}


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
