"""What only a GPU can show. benchmarks/on_gpu.sh runs these tests where there is one; elsewhere they are skipped."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.engine import late, loop
from remap.engine.late import may_read_late
from remap.engine.training import Training
from remap.errors import Interrupted
from remap.pipeline.run import resume, start
from remap.remapping.objective import Objective
from remap.runs.run_dir import RunDir

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BF16 = ("train.precision=bf16", "train.checkpoint_seconds=1000", "data.augment=shift")


def recipe_of(tiny: Any, *settings: str, **words: Any) -> Any:
    return tiny.recipe(*BF16, *settings, **{"method": "lora", "losses": "ce,kd", **words})


def task(run: Path) -> bytes:
    return (RunDir(run).task / "task.safetensors").read_bytes()


def test_a_step_waits_for_nothing(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own check: between the batch and the optimiser's step no operation waits for the device."""
    forward, step, counted, steps = loop.forward_backward, loop.step_if_finite, loop.gather_result, [0]

    def watched(training: Training, update: int) -> Any:
        if update:  # the first step checks gradients, and allocates
            torch.cuda.set_sync_debug_mode("error")
        return forward(training, update)

    def done(training: Training, pending: Any) -> None:
        step(training, pending)
        torch.cuda.set_sync_debug_mode("default")
        steps[0] += 1

    monkeypatch.setattr(loop, "forward_backward", watched)
    monkeypatch.setattr(loop, "step_if_finite", done)
    assert counted is loop.gather_result
    try:
        start(recipe_of(tiny), tmp_path / "run")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps[0] == 6


def test_reading_late_changes_no_bit(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a step that is not finite in it; source: a host that reads each step at once."""
    forward, attempt, now = Objective.forward, loop.forward_backward, [0]

    def poisoned(objective: Objective, *rest: Any) -> Any:
        total, parts = forward(objective, *rest)
        return (total * float("nan") if now[0] == 1 else total), parts

    def counted(training: Training, update: int) -> Any:
        now[0] = update
        assert update or may_read_late(training) is bool(late.DEVICES)
        return attempt(training, update)

    monkeypatch.setattr(Objective, "forward", poisoned)
    monkeypatch.setattr(loop, "forward_backward", counted)
    later = start(recipe_of(tiny), tmp_path / "later")
    monkeypatch.setattr(late, "DEVICES", ())
    start(recipe_of(tiny), tmp_path / "at_once")
    assert later.summary["faults"]["skipped_steps"] == 1
    assert task(tmp_path / "later") == task(tmp_path / "at_once")


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_has_the_same_bits(tiny: Any, tmp_path: Path, watch: Callable[..., Any], step: int) -> None:
    """Checkpoints are copied from the device and written while training continues."""
    start(recipe_of(tiny, "train.checkpoint_seconds=0"), tmp_path / "whole")
    stop = watch(lambda done: signal.raise_signal(signal.SIGTERM) if done == step else None)
    with pytest.raises(Interrupted):
        start(recipe_of(tiny), tmp_path / "run", stop)
    resume(tmp_path / "run")
    assert task(tmp_path / "run") == task(tmp_path / "whole")


@pytest.mark.parametrize("word", ["true", "graphs"])
def test_compiled_blocks_train(tiny: Any, tmp_path: Path, word: str) -> None:
    """bf16 rounds fused operations elsewhere, so accuracy is all that has to agree."""
    compiled = start(recipe_of(tiny, f"train.compile={word}"), tmp_path / "compiled")
    plain = start(recipe_of(tiny, "train.compile=false"), tmp_path / "plain")
    difference = compiled.summary["final_losses"]["loss"] - plain.summary["final_losses"]["loss"]
    assert abs(difference) < 0.05 * plain.summary["final_losses"]["loss"]
