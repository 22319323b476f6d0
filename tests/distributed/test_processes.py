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
from forked import Forked
from safetensors.torch import load_file

from remap.distributed import launch
from remap.errors import TrainingError
from remap.pipeline.run import resume, start
from remap.recipe import resolve_distill
from remap.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen]
Fork = Callable[..., Forked]
# Long enough to be caught in the middle; a checkpoint after every step.
EPOCHS = 40
LONG = (
    *(f"train.epochs={EPOCHS}", f"train.eval_every={EPOCHS}"),
    *("train.checkpoint_seconds=0", "data.augment=shift_flip"),
)


@pytest.mark.guarantee(4)
def test_a_killed_run_goes_on_to_the_same_bytes(tiny: Any, tmp_path: Path, fork_command: Fork) -> None:
    """SIGKILL in the middle of an epoch; the twin is trained without a break."""
    process = fork_command("remap_cli", "distill", *tiny.arguments(*LONG), f"--output={tmp_path / 'run'}")
    state = _wait_for_steps(tmp_path / "run", process.alive, epoch=2)
    process.kill()
    assert state["step"] and RunDir(tmp_path / "run").status() == "running"
    resumed = resume(tmp_path / "run")
    twin = start(tiny.recipe(*LONG), tmp_path / "twin")
    assert _task(resumed.run_dir) == _task(twin.run_dir)


@pytest.mark.guarantee(5)
def test_ctrl_c_says_how_to_go_on(tiny: Any, tmp_path: Path, start_process: Start) -> None:
    """To the command that started two processes; one goes on."""
    run = tmp_path / "run"
    process = start_process("remap_cli", "distill", *tiny.arguments(*LONG), "--devices=2", f"--output={run}")
    before = _wait_for_steps(run, lambda: process.poll() is None, epoch=1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert f"remap distill --resume {run}" in errors and "Traceback" not in errors and errors.count("stopped by") == 1
    assert RunDir(run).status() == "stopped"
    after = _state(run)
    assert (after["epoch"], after["step"]) >= (before["epoch"], before["step"])
    assert len((resume(run).run_dir / "metrics.jsonl").read_text().splitlines()) == EPOCHS
    assert RunDir(run).status() == "done"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("data.augment=strong", "data.views=2", "teacher.cache=disk", "data.labels=12"), {"also": "self"}),
        (("data.augment=shift", "data.mixup=0.8", "data.cutmix=1.0", "train.accumulation=2"), {"also": "ema"}),
        (
            (
                *("train.keep=best", "train.patience=1", "train.epochs=5", "train.metric=loss", "data.selection=0.3"),
                *("train.ema=0.8", "train.class_weight_power=1", "train.class_weight_by=sampling"),
                *("train.checkpoint_blocks=true", "train.lr=0.1"),
            ),
            {"also": "self"},
        ),
    ],
    ids=["closed views on disk, few labels", "mixing, an average", "the best epoch, early stopping, an average"],
)
def test_two_processes_share_teachers_and_lessons(
    tiny: Any, tmp_path: Path, fork_command: Fork, settings: tuple[str, ...], words: dict[str, str]
) -> None:
    """As above; each process computes half of what is kept on disk, and rows of both are read by both."""
    settings = (*settings, "teacher.allow_weak=true")
    words = {"losses": "ce,kd,feature", "teacher": f"{tiny.teacher},{words['also']}"}
    command = ("remap_cli", "distill", *tiny.arguments(*settings, **words), f"--output={tmp_path / 'two'}")
    fork_command(*command, count=2).end()
    start(tiny.recipe(*settings, "teacher.cache=off", **words), tmp_path / "one")
    one, two = _tensors(tmp_path / "one"), _tensors(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-5, rtol=0), name
    choices = [RunDir(tmp_path / name).summary().get("choice", {}) for name in ("one", "two")]
    assert choices[0].pop("best", 0.0) == pytest.approx(choices[1].pop("best", 0.0), abs=1e-4)
    assert choices[0] == choices[1]


@pytest.mark.parametrize(
    "settings",
    # Not bitfit: a key's bias has no gradient but rounding, and Adam's first step is as large as any.
    [
        ("teacher.cache=memory", "data.labels=15"),
        ("teacher.cache=disk", "teacher.prepare=adaptformer", "teacher.lr=0.01"),
    ],
    ids=["probes, few labels", "tuned teachers on disk"],
)
def test_two_processes_prepare_the_teachers_of_all_folds(
    tiny: Any, tmp_path: Path, fork_command: Fork, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which images are in which fold decides every answer, and so the student."""
    settings = (*settings, "teacher.folds=3", "teacher.epochs=1", "teacher.allow_weak=true", "train.precision=fp32")
    words = {"losses": "ce,kd,feature"}
    command = ("remap_cli", "distill", *tiny.arguments(*settings, **words), f"--output={tmp_path / 'two'}")
    fork_command(*command, count=2).end()
    monkeypatch.setenv("REMAP_CACHE", str(tmp_path / "own"))
    start(tiny.recipe(*settings, **words), tmp_path / "one")
    for folder in ("teacher-fold-1", "teacher-fold-2", "teacher-fold-3", "."):
        one, two = _tensors(tmp_path / "one" / folder), _tensors(tmp_path / "two" / folder)
        for name, tensor in one.items():
            assert torch.allclose(two[name], tensor, atol=1e-5, rtol=0), (folder, name)


def test_processes_that_nobody_started_are_missed(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="asks for 2 processes and has 1") as caught:
        start(tiny.recipe("train.processes=2"), tmp_path / "run")
    assert "--devices 2" in str(caught.value) and "torchrun --nproc-per-node 2" in str(caught.value)
    assert "env -u" not in str(caught.value)
    monkeypatch.setenv("RANK", "0")  # as Kubernetes may: there, --devices starts nothing
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(TrainingError, match="without a launcher: env -u RANK -u WORLD_SIZE remap ... --devices 2"):
        start(tiny.recipe("train.processes=2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_any_number_of_processes_but_the_one_asked_for_counts(tiny: Any, tmp_path: Path) -> None:
    """The batch size is global, so the number of before binds nobody."""
    RunDir.create(tmp_path / "run", tiny.recipe("train.processes=2", losses="ce"))
    with pytest.raises(TrainingError, match="asks for 3 processes and has 1"):
        resume(tmp_path / "run", processes=3)
    assert resume(tmp_path / "run").summary["processes"] == 1


def test_a_launcher_that_starts_one_process_in_silence_is_caught(
    tiny: Any, tmp_path: Path, start_process: Start
) -> None:
    """``accelerate launch --cpu --num_processes 2`` is known to. Nothing else is started inside a launcher."""
    process = start_process(
        *("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "remap_cli", "distill"),
        *(*tiny.arguments(), "--devices=2", f"--output={tmp_path / 'run'}"),
    )
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "asks for 2 processes and has 1" in errors
    assert not (tmp_path / "run").exists()


def test_two_processes_build_a_cache_and_evaluate(tiny: Any, tmp_path: Path, fork_command: Fork) -> None:
    """The images are computed once, each process its half; what one process evaluates, two evaluate alike."""
    arguments = tiny.arguments("teacher.cache=disk", "seed=77")
    run = start(tiny.recipe(losses="ce"), tmp_path / "run")
    (built,) = json.loads(fork_command("remap_cli", "cache", "build", *arguments, "--json", count=2).end())
    assert (built["images"], built["computed"]) == (24, 24)
    found = json.loads(fork_command("remap_cli", "eval", str(run.run_dir), "--json", count=2).end())
    assert (found["images"], found["correct"]) == (9, run.summary["student"]["correct"])


@pytest.mark.parametrize("word", ["soon", "0", "-3", "nan", "inf", "1e30"])
def test_a_timeout_that_is_no_number_of_seconds(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.VARIABLE, word)
    with pytest.raises(
        TrainingError, match=f"REMAP_TIMEOUT must be a number of seconds\n  given:   {word}\n.* at most "
    ):
        launch.accelerator.__wrapped__()


def test_a_launcher_that_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(TrainingError, match="asks for DeepSpeed, which is not supported"):
        launch.accelerator.__wrapped__()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="3 processes on a machine with 2 GPUs"):
        launch.accelerator.__wrapped__()


# What Gloo says when a process was killed, and when one is halted.
CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:20868. This is "
    "typically caused by a remote worker crashing."
)
SILENT = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(CLOSED), "another process of this run has ended (Connection closed by peer [127.0.0.1]:20868)"),
        (
            RuntimeError(SILENT),
            "another process of this run does not answer (Timed out waiting 4000ms for recv operation)",
        ),
        (torch.distributed.DistNetworkError("refused"), "another process of this run has ended (refused)"),
        (RuntimeError("shape mismatch"), None),
        (ValueError(CLOSED), None),
        (None, None),
    ],
)
def test_a_broken_connection_is_told_from_other_errors(error: Exception | None, expected: str | None) -> None:
    found = launch.lost_process(error)
    assert (None if found is None else found.what) == expected
    if found is not None:
        outer = KeyError("in the loop")
        outer.__context__ = error
        assert launch.lost_process(outer).what == expected


def _wait_for_steps(run: Path, alive: Callable[[], bool], epoch: int) -> dict:
    """The state of the first checkpoint that lies inside epoch ``epoch`` or later."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert alive()
        state = _state(run)
        if state["epoch"] >= epoch and state["step"]:
            return state
        time.sleep(0.01)
    raise AssertionError("no checkpoint within 200 s")


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


def test_two_processes_compare_the_whole_batch(
    tiny: Any, tmp_path: Path, fork_command: Fork, largest_difference: Callable[..., float]
) -> None:
    """Losses over the batch, with a queue and projectors, of a run without labels: those of one process."""
    words = {"losses": "rkd,crd,queue,feature", "method": "lora"}
    arguments = [f"--{name}={value}" for name, value in words.items()]
    folders = [f"--unlabeled={tiny.data}/train", f"--student={tiny.student}", f"--teacher={tiny.teacher}"]
    settings = (*tiny.SETTINGS, "losses.feature.normalize=standard", "train.accumulation=2")
    given = [*arguments, *folders, *(f"--set={setting}" for setting in settings)]
    fork_command("remap_cli", "distill", *given, f"--output={tmp_path / 'two'}", count=2).end()
    options = {**words, "student": tiny.student, "teacher": tiny.teacher, "unlabeled": f"{tiny.data}/train"}
    one = start(
        resolve_distill(None, options, tiny.SETTINGS + ("losses.feature.normalize=standard",)), tmp_path / "one"
    )
    two = load_file(tmp_path / "two" / "task" / "task.safetensors")
    assert largest_difference(one.student.trained, two) < 2e-5
