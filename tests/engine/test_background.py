"""Checkpoints that a thread writes: by time, of the moment they were begun, and complete or absent."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from remap.engine import training
from remap.engine.background import BackgroundWriter
from remap.engine.checkpoint import snapshot
from remap.errors import RunError, ThreadRefused, TrainingError
from remap.pipeline.run import resume, start
from remap.recipe import Recipe
from remap.runs.run_dir import RunDir

WORKER = Path(__file__).parents[1] / "reliability" / "workers" / "stuck_thread.py"


def recipe_of(tiny: Any, seconds: float, *settings: str) -> Recipe:
    return tiny.recipe(f"train.checkpoint_seconds={seconds}", *settings, method="lora", losses="ce", teacher=None)


def test_the_writer_runs_beside_and_hands_errors_over() -> None:
    writer, may_end = BackgroundWriter(), Event()
    assert writer.is_done and writer.finish() is None
    writer.begin(may_end.wait)
    assert not writer.is_done, "the caller goes on while it writes"
    may_end.set()
    assert writer.finish() is None and writer.is_done

    def fail() -> None:
        raise RunError("the disk is gone")

    writer.begin(fail)
    assert str(writer.finish()) == "the disk is gone" and writer.finish() is None


def test_a_writer_without_a_thread_leaves_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = BackgroundWriter()
    with monkeypatch.context() as patch, pytest.raises(ThreadRefused):
        patch.setattr(Thread, "start", refuse)
        writer.begin(lambda: None)
    assert writer.is_done and writer.finish() is None


def test_a_snapshot_is_of_its_moment() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.square().sum().backward()
    optimizer.step()
    memory = {"score": torch.ones(2)}
    taken = snapshot({"weight": weight}, optimizer, memory)
    expected = {name: tensor.clone() for name, tensor in taken.items()}
    optimizer.step()
    memory["score"] += 1
    assert all(torch.equal(taken[name], expected[name]) for name in expected)
    assert not torch.equal(taken["parameter/weight"], weight)


def test_short_epochs_are_not_each_saved(tiny: Any, tmp_path: Path) -> None:
    """One checkpoint before the first step, and the last state; the file's numbers are those of the result."""
    result = start(recipe_of(tiny, 1000, "train.epochs=4"), tmp_path / "run")
    files = sorted(path.name for path in RunDir(tmp_path / "run").checkpoint.iterdir())
    assert files == ["000001.json", "000001.safetensors", "000002.json", "000002.safetensors"]
    folder = RunDir(tmp_path / "run").checkpoint
    assert json.loads((folder / "000002.json").read_text())["state"]["epoch"] == 4
    saved = load_file(folder / "000002.safetensors")
    for name, tensor in result.student.trained.items():
        assert torch.equal(saved[f"parameter/{name}"], tensor.detach())


def test_a_number_that_is_not_finite_in_a_thread_ends_the_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = training.save_checkpoint, [0]

    def spoiled(folder: Path, state: Any, tensors: dict[str, torch.Tensor]) -> None:
        calls[0] += 1
        if calls[0] == 3:
            tensors = {name: tensor * float("nan") for name, tensor in tensors.items()}
        save(folder, state, tensors)

    monkeypatch.setattr(training, "save_checkpoint", spoiled)
    with pytest.raises(TrainingError, match="cannot be saved: not finite"):
        start(recipe_of(tiny, 0), tmp_path / "run")


@pytest.mark.slow
def test_killed_while_a_thread_writes(tiny: Any, tmp_path: Path, fork_command: Callable[..., Any]) -> None:
    """SIGKILL; source: the run without a break."""
    marker, run = tmp_path / "marker", tmp_path / "run"
    words = {**tiny.words(), "method": "lora", "losses": "ce", "teacher": None}
    settings = [*tiny.SETTINGS, "train.checkpoint_seconds=0"]
    process = fork_command(str(WORKER), json.dumps([words, settings, str(run), str(marker)]))
    until = time.monotonic() + 120
    while not marker.exists() and process.alive() and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    assert marker.read_text() == "checkpoint", "the name of the thread"
    assert sorted(path.suffix for path in RunDir(run).checkpoint.glob("000003.*")) == [".safetensors"]
    resume(run)
    start(recipe_of(tiny, 0), tmp_path / "twin")
    tasks = [(RunDir(one).task / "task.safetensors").read_bytes() for one in (run, tmp_path / "twin")]
    assert tasks[0] == tasks[1]
