"""The callbacks of a run, its trackers among them, as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from remap.distributed.launch import accelerator
from remap.engine.callback import Callback, raised_in
from remap.errors import RecipeError
from remap.pipeline.run_status import RunClock
from remap.pipeline.trackers import Tracker, require_installed
from remap.recipe import Recipe
from remap.runs.run_dir import RunDir


class Callbacks(Callback):
    """Several callbacks as one; a run that one of them ends counts as stopped.

    Attributes:
        summary: Of the run, once it has one.
    """

    def __init__(self, callbacks: Sequence[Callback], clock: RunClock) -> None:
        self._callbacks, self._clock = callbacks, clock
        self.summary: Mapping[str, Any] | None = None

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda one: one.on_step(step, values))

    def on_epoch(self, step: int, record: Mapping[str, Any]) -> None:
        self._each(lambda one: one.on_epoch(step, record))

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self._each(lambda one: one.on_end(summary))

    def _each(self, call: Callable[[Callback], None]) -> None:
        """Call all of them, also where one raises; then raise the first error."""
        raised: list[Exception] = []
        for callback in self._callbacks:
            if (error := raised_in(accelerator(), call, callback)) is not None:
                raised.append(error)
        # One error ends the run; the others are named in it, so that none is lost.
        for another in raised[1:]:
            raised[0].add_note(f"and another callback: {another!r}")
        if raised:
            self._clock.ended_by = raised[0]  # the status of the run is then "stopped", not "failed"
            raise raised[0]


def require_callbacks(callbacks: Sequence[object]) -> None:
    """Refuse what is not a callback before anything is made.

    Raises:
        RecipeError: One is a class, or has not the methods.
    """
    for one in callbacks:
        has_all = all(callable(getattr(one, name, None)) for name in ("on_step", "on_epoch", "on_end"))
        if isinstance(one, type) or not has_all:
            given = f"the class {one.__name__} (write {one.__name__}())" if isinstance(one, type) else repr(one)
            raise RecipeError([f"callbacks: should be objects of a remap.Callback, got {given}"], "remap")


@contextmanager
def called(callbacks: Sequence[Callback], recipe: Recipe, run_dir: RunDir, clock: RunClock) -> Iterator[Callbacks]:
    """Give the callbacks of a run and its trackers, and call them at its end, however it ends.

    Raises:
        RunError: A tracker is not installed.
    """
    require_installed(recipe)
    main = accelerator().is_main_process
    trackers = [Tracker(name, recipe, run_dir) for name in recipe.train.track]
    # In the main process alone: each process would log the same run once more.
    all_of_them = Callbacks([*trackers, *callbacks] if main else [], clock)
    try:
        yield all_of_them
    except BaseException as error:
        ended_by = clock.ended_by
        try:
            all_of_them.on_end(None)
        except Exception as another:  # the first error counts
            clock.ended_by = ended_by  # or a callback would count as what ended the run
            error.add_note(f"and a callback at the end: {another!r}")
        raise
    # Outside of the try: what is raised here does not call on_end a second time.
    all_of_them.on_end(all_of_them.summary)
