"""The world around a run: clocks that jump, data threads that die, files that vanish. Expected: an undisturbed twin."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.data.views import ViewSource
from remap.engine.training import Training
from remap.pipeline.run import resume, start
from remap.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

# Views are decoded again in every epoch, by two threads.
DECODED = ("data.memory_gib=0", "data.workers=2", "data.augment=shift", "train.checkpoint_seconds=0")


@pytest.mark.guarantee(25)
def test_a_clock_that_jumps_changes_nothing(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[..., Any],
    history: Callable[[Path], list[dict]],
    largest_difference: Callable[..., float],
    figure: Callable[..., None],
) -> None:
    """The time of day leaps a year back or ahead after every step, as a correction of the clock would."""
    recipe = tiny.recipe()
    twin = start(recipe, tmp_path / "twin")
    shift, now, local = [0.0], time.time, time.gmtime
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])
    monkeypatch.setattr(time, "gmtime", lambda *given: local(*(given or (now() + shift[0],))))

    def leap(done: int) -> None:
        shift[0] = (-1) ** done * 365 * 86400.0

    result = start(recipe, tmp_path / "run", watch(leap))
    assert largest_difference(result.student.tensors, twin.student.tensors) == 0.0
    assert history(tmp_path / "run") == history(tmp_path / "twin")
    assert 0 < result.summary["train_seconds"] < result.summary["seconds"] < 600
    figure("runs under a jumping clock, equal to the one without", 1, 1)


@pytest.mark.guarantee(25)
def test_a_data_thread_that_dies_ends_the_run_and_it_goes_on(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_difference: Callable[..., float]
) -> None:
    """Not an unreadable image but a fault of the machine: never skipped in silence, never waited for."""
    recipe = tiny.recipe(*DECODED)
    twin = start(recipe, tmp_path / "twin")
    read, training, dead = ViewSource._read, [False], [False]
    start_epoch = Training.start_epoch

    def begin(running: Training) -> None:
        training[0] = running.state.epoch == 1
        start_epoch(running)

    def die(source: ViewSource, index: int) -> Any:
        if training[0] and not dead[0] and threading.current_thread() is not threading.main_thread():
            dead[0] = True
            raise LookupError("a decoder has died")
        return read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(ViewSource, "_read", die)
        patch.setattr(Training, "start_epoch", begin)
        with pytest.raises(LookupError, match="a decoder has died"):
            start(recipe, tmp_path / "run")
    assert RunDir(tmp_path / "run").status() == "failed"
    result = resume(tmp_path / "run")
    assert largest_difference(result.student.tensors, twin.student.tensors) == 0.0


@pytest.mark.guarantee(25)
def test_images_that_vanish_are_skipped_and_named(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """Two of twenty-four, removed in the first epoch of a run that reads them again in the second."""
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    gone = ["train/blue/00.png", "train/red/03.png"]

    def remove(done: int) -> None:
        if done == 3:
            for name in gone:
                (data / name).unlink()

    progress = watch(remove)
    result = start(tiny.recipe(*DECODED, data=str(data)), tmp_path / "run", progress)
    skipped = result.summary["data"]["skipped"]
    assert [name for name, _ in skipped] == gone
    assert any(gone[0] in line and gone[1] in line for line in progress.said)
