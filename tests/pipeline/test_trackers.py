"""Trackers, on the files that they leave where there is no network."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import remap
from remap.errors import RunError
from remap.pipeline import trackers
from remap.pipeline.build_cache import build_cache
from remap.pipeline.run import resume
from remap.recipe import Recipe
from remap.runs.run_dir import RunDir

STEPS = list(range(1, 7))  # two epochs of three


class Stops(remap.Callback):
    """Ends the run after its fourth step, when trackers have logged it."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        if step == 4:
            raise ZeroDivisionError


@pytest.fixture
def tracked(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains with a tracker, is stopped and resumed; the run directory."""
    monkeypatch.setattr(trackers, "STEPS_BETWEEN", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def train(track: str) -> Path:
        recipe: Recipe = tiny.recipe(f"train.track={track}", method="bitfit", losses="ce")
        with pytest.raises(ZeroDivisionError):
            remap.distill(recipe, output=tmp_path / "run", callbacks=[Stops()])
        resume(tmp_path / "run")
        return tmp_path / "run"

    return train


def test_tensorboard_has_every_step_once(tracked: Any) -> None:
    """As its own reader sees the files, although the run was stopped and resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked("tensorboard")
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert [event.step for event in found.Scalars("step/loss")] == STEPS
    assert [event.step for event in found.Scalars("epoch/accuracy")] == [3, 6]
    assert [event.value for event in found.Scalars("epoch/loss")] == pytest.approx([r["loss"] for r in records])
    (accuracy,) = found.Scalars("summary/student.accuracy")
    assert accuracy.step == 6 and accuracy.value == pytest.approx(summary["student"]["accuracy"])
    (config,) = (run / "tensorboard").glob("*/hparams.yml")
    assert "train.batch_size: 8" in config.read_text() and "losses.ce.weight: 1.0" in config.read_text()


@pytest.mark.slow
def test_mlflow_continues_its_run(tracked: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    tracked("mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    client = mlflow.MlflowClient()
    assert [m.step for m in client.get_metric_history(run.info.run_id, "step/loss")] == STEPS
    assert run.data.params["train.batch_size"] == "8" and "summary/student.accuracy" in run.data.metrics
    assert run.info.run_name == "run" and run.info.status == "FINISHED"


@pytest.mark.slow
def test_wandb_continues_its_run_offline(tracked: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tracked("wandb")
    known = json.loads((run / "trackers.json").read_text())["wandb"]
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{known}"}


def test_what_is_not_installed_is_refused_before_anything(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else name)
    with pytest.raises(RunError, match="trackio: not installed") as caught:
        remap.distill(tiny.recipe("train.track=tensorboard,trackio"), output=tmp_path / "run")
    assert caught.value.do == "pip install trackio" and not (tmp_path / "run").exists()


def test_a_tracker_that_fails_stops_the_run_with_a_word(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.Tracker, "_started", lambda self, step: 1 / 0)
    recipe, run = tiny.recipe("train.track=tensorboard", method="bitfit", losses="ce"), tmp_path / "run"
    with pytest.raises(RunError, match="tensorboard did not take the figures") as caught:
        remap.distill(recipe, output=run)
    assert "ZeroDivisionError" in caught.value.given and f"--resume {run}" in caught.value.do
    assert RunDir(run).status() == "stopped"


def test_a_recipe_names_trackers_as_a_word_or_a_list(tiny: Any) -> None:
    """Which change no result: a run with them resumes one without."""
    both = tiny.recipe("train.track=wandb,mlflow")
    assert both == tiny.recipe("train.track=[wandb, mlflow]") == tiny.recipe(track="wandb,mlflow")
    assert both.digest() == tiny.recipe().digest()
    with pytest.raises(remap.RemapError, match="tensorboard"):
        tiny.recipe("train.track=tensorbord")


class Logged:
    """A tracker of Accelerate that notes what it is given; ``runs`` has what each start continued."""

    runs: list[str | None] = []
    rows: list[tuple[int | None, set[str]]] = []

    def __init__(self, project: str, run_id: str | None = None, run_name: str | None = None) -> None:
        self.name, self.tracker = "mlflow", SimpleNamespace(info=SimpleNamespace(run_id="ab"))
        self.runs.append(run_id)

    def start(self) -> None: ...

    def store_init_configuration(self, values: Mapping[str, Any]) -> None: ...

    def finish(self) -> None: ...

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        self.rows.append((step, {name.partition("/")[0] for name in values}))


def test_what_a_killed_run_has_logged_is_not_logged_again(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes back to its checkpoint, here behind step 2, and does the steps after it once more."""
    monkeypatch.setattr(trackers, "STEPS_BETWEEN", 1)
    monkeypatch.setattr(trackers, "LOGGER_TYPE_TO_CLASS", {"mlflow": Logged})
    recipe = tiny.recipe("train.track=mlflow")
    run_dir = RunDir.create(tmp_path / "run", recipe)
    for first, last in ((1, 5), (3, 6), (4, 3)):  # killed after step 5, and once more behind the last epoch
        tracker = trackers.Tracker("mlflow", recipe, run_dir)
        for step in range(first, last + 1):
            tracker.on_step(step, {"loss": 1.0})
            if step % 3 == 0:
                tracker.on_epoch(step, {"loss": 1.0})
    tracker.on_end({"accuracy": 0.5})
    steps, epochs, end = [{"step"}, {"epoch"}, {"summary"}]
    expected = [*((n, steps) for n in (1, 2, 3)), (3, epochs), *((n, steps) for n in (4, 5, 6)), (6, epochs), (6, end)]
    assert Logged.rows == expected and Logged.runs == [None, "ab", "ab"]


def test_building_a_cache_tracks_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    (found,) = build_cache(tiny.recipe("train.track=trackio", losses="ce,kd"))
    assert found["computed"] == 24
