"""Real processes: killed, interrupted, and two in place of one. Expected values: an undisturbed single process."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from remap.running import resume, start
from remap.runs.rundir import RunDir

Start = Callable[..., subprocess.Popen]
# Long enough to be caught in the middle; a checkpoint after every step.
EPOCHS = 40
LONG = (
    *(f"train.epochs={EPOCHS}", f"train.eval_every={EPOCHS}"),
    *("train.checkpoint_seconds=0", "data.augment=shift_flip"),
)
TWO = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "remap_cli")


def test_a_killed_run_goes_on_to_the_same_bytes(tiny: Any, tmp_path: Path, start_process: Start) -> None:
    """SIGKILL in the middle of an epoch; the twin is trained without a break."""
    process = start_process("remap_cli", "distill", *tiny.arguments(*LONG), f"--output={tmp_path / 'run'}")
    state = _wait_for_steps(tmp_path / "run", process, epoch=2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert state["step"] and RunDir(tmp_path / "run").status() == "running"
    resumed = resume(tmp_path / "run")
    twin = start(tiny.recipe(*LONG), tmp_path / "twin")
    assert _task(resumed.run_dir) == _task(twin.run_dir)


def test_ctrl_c_says_how_to_go_on(tiny: Any, tmp_path: Path, start_process: Start) -> None:
    run = tmp_path / "run"
    process = start_process("remap_cli", "distill", *tiny.arguments(*LONG), f"--output={run}")
    before = _wait_for_steps(run, process, epoch=1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"remap distill --resume {run}" in errors and "Traceback" not in errors
    assert RunDir(run).status() == "stopped"
    after = _state(run)
    assert (after["epoch"], after["step"]) >= (before["epoch"], before["step"])
    assert len((resume(run).run_dir / "metrics.jsonl").read_text().splitlines()) == EPOCHS
    assert RunDir(run).status() == "done"


def test_two_processes_train_the_student_of_one(
    tiny: Any, tmp_path: Path, start_process: Start, history: Callable[[Path], list[dict]]
) -> None:
    """The same global batch, dropout on: float sums in another order is all that may differ."""
    settings = ("data.augment=shift_flip", "train.accumulation=2")
    arguments = [*tiny.arguments(*settings, losses="ce,kd,attention,feature"), "--processes=2", "--json"]
    process = start_process(*TWO, "distill", *arguments, f"--output={tmp_path / 'two'}")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    summary = json.loads(output)  # one object: only the first process prints
    expected = start(tiny.recipe(*settings, losses="ce,kd,attention,feature"), tmp_path / "one")
    assert summary["processes"] == 2 and expected.summary["processes"] == 1
    for name in ("correct", "accuracy", "initial_accuracy"):
        assert summary["student"][name] == expected.summary["student"][name]
    assert summary["teacher"]["accuracy"] == expected.summary["teacher"]["accuracy"]
    one, two = _tensors(tmp_path / "one"), _tensors(tmp_path / "two")
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-5, rtol=0), name
    for ours, theirs in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5)
    assert _names(tmp_path / "two") == _names(tmp_path / "one")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("data.augment=shift", "data.views=2", "teacher.cache=disk", "data.labels=12"), {"also": "self"}),
        (("data.augment=shift", "data.mixup=0.8", "data.cutmix=1.0", "train.accumulation=2"), {"also": "ema"}),
    ],
    ids=["closed views on disk, few labels", "mixing, an average"],
)
def test_two_processes_share_teachers_and_lessons(
    tiny: Any, tmp_path: Path, start_process: Start, settings: tuple[str, ...], words: dict[str, str]
) -> None:
    """As above; each process computes half of what is kept on disk, and rows of both are read by both."""
    settings = (*settings, "teacher.allow_weak=true")
    words = {"losses": "ce,kd,feature", "teacher": f"{tiny.teacher},{words['also']}"}
    process = start_process(*TWO, "distill", *tiny.arguments(*settings, **words), f"--output={tmp_path / 'two'}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    start(tiny.recipe(*settings, "teacher.cache=off", **words), tmp_path / "one")
    one, two = _tensors(tmp_path / "one"), _tensors(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-5, rtol=0), name


def test_processes_that_the_launcher_did_not_start_are_missed(tiny: Any, tmp_path: Path, start_process: Start) -> None:
    process = start_process("remap_cli", "distill", *tiny.arguments(), "--processes=2", f"--output={tmp_path / 'run'}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "asks for 2 processes and has 1" in errors and "torchrun --nproc-per-node 2" in errors
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_starts_one_process_in_silence_is_caught(
    tiny: Any, tmp_path: Path, start_process: Start
) -> None:
    """``accelerate launch --cpu --num_processes 2`` is known to."""
    process = start_process(
        *("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "remap_cli", "distill"),
        *(*tiny.arguments(), "--processes=2", f"--output={tmp_path / 'run'}"),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "asks for 2 processes and has 1" in errors
    assert not (tmp_path / "run").exists()


def _wait_for_steps(run: Path, process: subprocess.Popen, epoch: int) -> dict:
    """The state of the first checkpoint that lies inside epoch ``epoch`` or later."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        state = _state(run)
        if state["epoch"] >= epoch and state["step"]:
            return state
        time.sleep(0.01)
    raise AssertionError("no checkpoint within a minute")


def _state(run: Path) -> dict:
    """In the newest manifest; where there is none yet, or it was replaced this instant, the start of a run."""
    try:
        newest = max(RunDir(run).checkpoint.glob("[0-9]*.json"))
        return json.loads(newest.read_text())["state"]
    except (ValueError, FileNotFoundError):
        return {"epoch": 0, "step": 0}


def _task(run: Path) -> bytes:
    return (RunDir(run).task / "task.safetensors").read_bytes()


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(RunDir(run).task / "task.safetensors")


def _names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}
