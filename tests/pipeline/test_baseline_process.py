"""The baseline beside its student, in a process of its own: the same bits, and nothing is lost with that process."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from remap.distributed.launcher_env import without_launcher
from remap.errors import Interrupted
from remap.pipeline import baseline_process
from remap.pipeline.run import resume, start
from remap.runs.run_dir import RunDir

Watch = Callable[..., Any]
# The precision is named, since the other process does not have ``native_bf16``.
SETTINGS = ("baseline=true", "teacher.allow_weak=true", "train.precision=fp32")
NO_IMPORTS = (sys.executable, "-S", "-c")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Half of them is one, as in all other tests."""
    monkeypatch.setattr(baseline_process, "LEAST_STEPS", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def tasks(run: Path) -> dict[str, Any]:
    names = ("task", "baseline/task")
    return {f"{name} {key}": one for name in names for key, one in load_file(run / name / "task.safetensors").items()}


@pytest.mark.usefixtures("two_threads")
def test_both_have_the_bits_of_one_after_the_other(
    tiny: Any, tmp_path: Path, largest_difference: Callable, watch: Watch
) -> None:
    trained: list[int] = []
    beside = start(tiny.recipe(*SETTINGS), tmp_path / "beside", watch(trained.append))
    assert len(trained) == 6, "twelve where this process trains the baseline too"
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    after = start(tiny.recipe(*SETTINGS), tmp_path / "after", watch(trained.append))
    assert len(trained) == 18
    assert largest_difference(tasks(beside.run_dir), tasks(after.run_dir)) == 0.0
    same = ("accuracy", "interval", "losses", "epochs")
    assert all(beside.summary["baseline"][name] == after.summary["baseline"][name] for name in same)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("command", [(*NO_IMPORTS, "raise SystemExit(1)"), ("no-such-program",)], ids=["ends", "none"])
def test_without_that_process_it_is_trained_afterwards(
    tiny: Any, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(baseline_process, "COMMAND", command)
    trained: list[int] = []
    run = start(tiny.recipe(*SETTINGS), tmp_path / "run", watch(trained.append))
    assert len(trained) == 12 and run.summary["baseline"]["accuracy"] is not None


@pytest.mark.usefixtures("two_threads")
def test_a_signal_stops_both_and_the_run_can_be_resumed(
    tiny: Any, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, largest_difference: Callable
) -> None:
    saves = (
        "import json, signal, sys, time\n"
        "_, folder = json.loads(sys.stdin.readline())\n"
        "def save(*_):\n    open(folder + '/saved', 'w'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save); open(folder + '/ready', 'w')\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(baseline_process, "COMMAND", (*NO_IMPORTS, saves))
    folder = tmp_path / "run"

    def interrupt(step: int) -> None:
        if step == 4:
            while not (folder / "baseline/ready").exists():
                pass
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(tiny.recipe(*SETTINGS), folder, watch(interrupt))
    assert (folder / "baseline/saved").exists(), "the process has been ended, and before that could save its state"
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(baseline_process, "COMMAND", (*NO_IMPORTS, "raise SystemExit(1)"))
    resume(folder)
    assert "resumed" not in RunDir(folder).environment(), "as many threads as before, half of them for each"
    torch.set_num_threads(1)
    whole = start(tiny.recipe(*SETTINGS), tmp_path / "whole")
    assert largest_difference(tasks(folder), tasks(whole.run_dir)) == 0.0


def test_the_process_ends_with_the_one_that_started_it(tiny: Any, tmp_path: Path) -> None:
    """Which may be killed, and then ends nothing itself: the input of the process is closed."""
    run_dir = RunDir.create(tmp_path / "run", tiny.recipe("teacher.allow_weak=true", "train.epochs=100000"))
    begun, waiting = (baseline_process.BaselineProcess("lora") for _ in range(2))
    begun.begin(run_dir, 1)
    while not (run_dir.path / "metrics.jsonl").is_file():
        assert begun._process.poll() is None
        time.sleep(0.1)
    for one, is_killed in ((begun, True), (waiting, False)):
        assert one._process.stdin is not None
        one._process.stdin.close()
        assert (one._process.wait(120) != 0) == is_killed


def test_it_loads_the_method_before_it_waits() -> None:
    process = baseline_process.BaselineProcess("a_method_that_is_not_there")
    assert process._process.wait(120) != 0
    process.stop()


@pytest.mark.usefixtures("two_threads")
def test_it_loads_while_the_teacher_is_prepared(tiny: Any, tmp_path: Path, watch: Watch) -> None:
    seen: list[tuple[int, bool]] = []

    def look(step: int) -> None:
        children = psutil.Process().children()
        seen.append((step, any("baseline_worker" in " ".join(child.cmdline()) for child in children)))

    start(tiny.recipe(*SETTINGS, "teacher.prepare=full", "teacher.epochs=1"), tmp_path / "run", watch(look))
    teacher, student = seen[: -len(seen) // 2], seen[-len(seen) // 2 :]
    assert teacher[-1][1] and student[-1][1]


def test_it_does_not_join_the_group_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    left = without_launcher()
    assert "OMP_NUM_THREADS" in left and "PATH" in left
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & left.keys()
