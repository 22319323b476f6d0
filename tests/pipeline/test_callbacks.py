"""One's own Python in a run, and a run that it ends."""

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import remap
from remap.errors import Interrupted, RunError
from remap.pipeline import run
from remap.runs.run_dir import RunDir

EPOCHS, STEPS = 2, 3  # of each epoch


class Recorder(remap.Callback):
    """What a run told, and an error at one of the calls."""

    def __init__(self, stops_at: tuple[str, int] | None = None) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.epochs: dict[int, Mapping[str, Any]] = {}
        self.ends: list[Mapping[str, Any] | None] = []
        self.stops_at = stops_at

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps[step] = values
        self._stop("on_step", step)

    def on_epoch(self, step: int, record: Mapping[str, Any]) -> None:
        self.epochs[step] = record
        self._stop("on_epoch", step)

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self.ends.append(summary)

    def _stop(self, call: str, step: int) -> None:
        if (call, step) == self.stops_at:
            raise ZeroDivisionError("the user's own")


class Idle(remap.Callback):
    """Overrides nothing."""


@pytest.fixture(scope="module")
def undisturbed(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    """With a baseline and a tuned teacher, whose steps are not those of the run."""
    recorder, path = Recorder(), tmp_path_factory.mktemp("callbacks") / "run"
    recipe = tiny.recipe("baseline=true", "teacher.prepare=full", "teacher.lr=0.01", "teacher.allow_weak=true")
    remap.distill(recipe, output=path, callbacks=[Idle(), recorder])
    return recorder, path


def test_a_callback_gets_steps_epochs_and_the_summary(undisturbed: tuple[Recorder, Path]) -> None:
    """As metrics.jsonl and summary.json have them; the loss of an epoch is the mean of its steps."""
    recorder, path = undisturbed
    assert list(recorder.steps) == list(range(1, EPOCHS * STEPS + 1))
    assert set(recorder.steps[1]) >= {"loss", "ce", "kd", "lr", "images/s", "left", "memory"}
    assert list(recorder.epochs) == [STEPS, 2 * STEPS]
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert list(recorder.epochs.values()) == records
    assert records[0]["loss"] == pytest.approx(sum(recorder.steps[n]["loss"] for n in (1, 2, 3)) / 3, rel=1e-6)
    assert recorder.ends == [json.loads((path / "summary.json").read_text())]
    assert "baseline" in recorder.ends[0]


@pytest.mark.parametrize("stops_at", [("on_step", 4), ("on_epoch", STEPS)])
def test_an_exception_stops_the_run_which_resumes_to_the_same_student(
    tiny: Any, undisturbed: tuple[Recorder, Path], tmp_path: Path, stops_at: tuple[str, int]
) -> None:
    recorder, path = Recorder(stops_at), tmp_path / "run"
    recipe = tiny.recipe("teacher.prepare=full", "teacher.lr=0.01", "teacher.allow_weak=true")
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        remap.distill(recipe, output=path, callbacks=[recorder])
    assert RunDir(path).outcome() == ("was stopped", 'by a callback: ZeroDivisionError("the user\'s own")')
    assert recorder.ends == [None]
    again = Recorder()
    run.resume(path, callbacks=[again])
    assert list(again.steps) == list(range(stops_at[1] + 1, EPOCHS * STEPS + 1)), "from the step that was saved"
    assert RunDir(path).status() == "done" and len(again.ends) == 1
    task = "task/task.safetensors"
    assert (path / task).read_bytes() == (undisturbed[1] / task).read_bytes()


def test_an_exception_is_raised_also_where_the_state_cannot_be_saved(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RunError("the disk is full")

    recipe = tiny.recipe(method="bitfit", losses="ce", teacher=None)
    for call in ("on_step", "on_epoch"):
        monkeypatch.setattr("remap.engine.saving.save", full)
        with pytest.raises(ZeroDivisionError, match="the user's own") as caught:
            remap.distill(recipe, output=tmp_path / call, callbacks=[Recorder((call, STEPS))])
        assert caught.value.__notes__ == ["and the state was not saved: the disk is full"]
        assert caught.traceback[-1].name == "_stop", "the traceback leads to the user's own line"
        assert RunDir(tmp_path / call).status() == "stopped"


def test_errors_of_several_callbacks_are_all_named(tiny: Any, tmp_path: Path) -> None:
    recorders = [Recorder(("on_step", 1)), Recorder(), Recorder(("on_step", 1))]
    with pytest.raises(ZeroDivisionError) as caught:
        remap.distill(tiny.recipe(losses="ce", teacher=None), output=tmp_path / "run", callbacks=recorders)
    assert caught.value.__notes__ == ['and another callback: ZeroDivisionError("the user\'s own")']
    assert list(recorders[1].steps) == [1]


class Impatient(remap.Callback):
    """Gets two signals in a call, and makes something of what they raise."""

    def __init__(self, call: str, makes: str) -> None:
        self._call, self._makes = call, makes

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._told_twice("on_step")

    def on_epoch(self, step: int, record: Mapping[str, Any]) -> None:
        self._told_twice("on_epoch")

    def _told_twice(self, call: str) -> None:
        if call != self._call:
            return
        try:
            twice()
        except Exception as error:
            if self._makes == "another error":
                raise ValueError("a service was not reached") from error
            if self._makes == "the same":
                raise


def twice(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("call", "makes"),
    [("on_step", "the same"), ("on_step", "another error"), ("on_step", "nothing"), ("on_epoch", "the same")],
)
def test_a_second_signal_in_a_callback_ends_the_run_at_once(tiny: Any, tmp_path: Path, call: str, makes: str) -> None:
    """No other callback is told of the step, and nothing is saved: the run begins again where it was saved before."""
    recorder, path = Recorder(), tmp_path / "run"
    recipe = tiny.recipe("train.checkpoint_seconds=1000", method="bitfit", losses="ce", teacher=None)
    with pytest.raises(Interrupted) as caught:
        remap.distill(recipe, output=path, callbacks=[Impatient(call, makes), recorder])
    assert caught.value.at_once and caught.value.exit_code == 143
    assert RunDir(path).outcome() == ("was stopped", "stopped at once; nothing more was saved")
    assert (list(recorder.steps), list(recorder.epochs)) == ([] if call == "on_step" else [1, 2, 3], [])
    again = Recorder()
    run.resume(path, callbacks=[again])
    assert list(again.steps) == list(range(1, EPOCHS * STEPS + 1))


def test_a_second_signal_while_the_state_is_saved_after_an_exception(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(method="bitfit", losses="ce", teacher=None)
    waited = list[Any]()
    monkeypatch.setattr("remap.engine.saving.save", twice)
    monkeypatch.setattr("remap.engine.saving.end_if", lambda *given: waited.append(given))  # for other processes
    with pytest.raises(Interrupted) as caught:
        remap.distill(recipe, output=tmp_path / "run", callbacks=[Recorder(("on_step", 1))])
    assert caught.value.at_once and not waited


@pytest.mark.parametrize("where", ["stored_teacher.fetch_teacher", "stored_teacher.store_teacher", "evidence.Runner"])
def test_a_signal_is_not_taken_for_what_a_run_can_do_without(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A cache that fails, or maps that a network does not have, end no run; a signal there does."""
    monkeypatch.setattr(f"remap.pipeline.{where}", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM(\n|$)"):  # not "while", later
        remap.distill(tiny.recipe("train.epochs=1", losses="ce,kd"), output=tmp_path / "run")
    assert RunDir(tmp_path / "run").status() == "stopped"


class Slow(remap.Callback):
    """As a tracker that starts with the first figures."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        time.sleep(0.3)


def test_the_time_of_callbacks_is_not_training_time(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(method="linear", losses="ce", teacher=None)
    summary = remap.distill(recipe, output=tmp_path / "run", callbacks=[Slow()]).summary
    assert summary["seconds"] - summary["train_seconds"] > 0.3 * EPOCHS * STEPS
