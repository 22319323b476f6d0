"""Several processes give what one gives, and end together. Real processes; expected values: one undisturbed process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file

from remap.distributed.launch import accelerator
from remap.engine.evaluation_pass import evaluate
from remap.engine.teacher import Teacher
from remap.errors import Interrupted
from remap.pipeline.components import build_components
from remap.pipeline.run import Result, resume, start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen]
History = Callable[[Path], list[dict]]
WORKERS = Path(__file__).parent / "workers"
SIZES = (1, 7, 97, 101)
# Two epochs of three steps; images and dropout change from step to step.
MOVING = ("data.augment=shift_flip",)
STEPS = 6
# Long enough to be caught in the middle; a checkpoint after every step.
LONG = (*("train.epochs=400", "train.eval_every=400"), *("train.checkpoint_seconds=0", *MOVING))
# What `accelerate config` writes for two GPUs. It is accepted without GPUs too, unlike MULTI_CPU, which starts one
# process; and its precision is not the run's.
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
machine_rank: 0
main_process_port: 0
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""


class Ranks:
    """What the processes of workers/many.py wrote down."""

    def __init__(self, folder: Path, count: int, words: dict, settings: tuple[str, ...], stop: int = 0) -> None:
        self.folder, self.count = folder, count
        arguments = json.dumps([count, str(folder), words, settings, SIZES, stop])
        Forked(folder, [str(WORKERS / "many.py"), arguments], count).end()
        files = [folder / f"noted-{count}-{rank}.json" for rank in range(count)]
        self.noted = [json.loads(file.read_text()) for file in files]
        assert [noted["processes"] for noted in self.noted] == [count] * count


@pytest.fixture(scope="module")
def alone(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[list[int]]]:
    """The run of one process without a break, and the images of each of its steps in their order."""
    used: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        _note_images(patch, used)
        return start(tiny.recipe(*MOVING), tmp_path_factory.mktemp("alone") / "run"), used


@pytest.fixture(scope="module")
def two(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Two processes finish `grown`, which one began and left after two steps; and leave `shrunk` in its fourth."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch, suppress(Interrupted):
        _note_images(patch, [], stop_at=2)
        start(tiny.recipe(*MOVING), folder / "grown")
    assert RunDir(folder / "grown").status() == "stopped"
    return Ranks(folder, 2, tiny.words(), (*tiny.SETTINGS, *MOVING), stop=4)


def _note_images(patch: pytest.MonkeyPatch, used: list[list[int]], stop_at: int = 0) -> None:
    targets = Teacher.targets

    def noting(teacher: Teacher, images_BCHW: torch.Tensor, indices_B: Any, view: int) -> Any:
        used.append(indices_B.tolist())
        if len(used) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return targets(teacher, images_BCHW, indices_B, view)

    patch.setattr(Teacher, "targets", noting)


@pytest.mark.guarantee(3)
def test_the_number_of_processes_may_change(
    two: Ranks,
    alone: tuple[Result, list[list[int]]],
    history: History,
    figure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From one to two in the first epoch, from two to one in the second."""
    expected, order = alone
    images: list[list[int]] = []
    _note_images(monkeypatch, images)
    resume(two.folder / "shrunk")
    grown, shrunk = (
        [first + second for first, second in zip(*(noted["used"][name] for noted in two.noted), strict=True)]
        for name in ("grown", "shrunk")
    )
    assert len(order) == STEPS
    assert (grown, shrunk, images) == (order[2:], order[:4], order[4:])
    largest = 0.0
    for name in ("grown", "shrunk"):
        for ours, theirs in zip(history(two.folder / name), history(expected.run_dir), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
        largest = max(largest, _difference(_tensors(two.folder / name), _tensors(expected.run_dir)))
        assert largest < 1e-5
    figure("changes between one and two processes: same order of images, losses within 1e-5", 2, 2)
    figure("largest difference of weights after a change", largest)


@pytest.mark.guarantee(17)
def test_what_is_averaged_is_what_is_trained(
    two: Ranks, alone: tuple[Result, list[list[int]]], figure: Callable[..., None]
) -> None:
    """The frozen backbone and the teacher stay outside. Source: the sizes of the tensors that the task keeps."""
    expected, _ = alone
    trained = sum(tensor.numel() for tensor in _tensors(expected.run_dir).values())
    assert trained < expected.student.num_parameters / 2
    for noted in two.noted:
        assert noted["averaged"] == [trained] * (STEPS - 2 + 4)
    summaries = [RunDir(two.folder / name).summary() for name in ("grown", "shrunk")]
    assert [summary["frozen"]["unchanged"] for summary in summaries] == [True, True]
    figure("numbers averaged that are not trained", two.noted[0]["averaged"][0] - trained)


@pytest.mark.guarantee(17)
def test_a_trainable_that_no_loss_reaches_is_named_before_the_first_step(
    tiny: Any, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """Both processes find out; it is said once."""
    run = tmp_path / "run"
    worker = [sys.executable, str(WORKERS / "spare_trainable.py")]
    code, _, errors = _run([*worker, "distill", *tiny.arguments(), "--devices=2", f"--output={run}"])
    assert code == 2, errors
    assert re.search(r"error: no loss reaches 1 of \d+ trained parameters; nothing was stepped", errors)
    assert "remap_spare" in errors and errors.count("error:") == 1
    assert RunDir(run).status() == "failed" and not (run / "metrics.jsonl").exists()
    figure("trainables without a gradient, named before the first step", 1, 1)


@pytest.mark.guarantee(19)
@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_counts_each_image_once(
    count: int,
    tiny: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    figure: Callable[..., None],
) -> None:
    """Expected: the predictions of this single process, image by image."""
    ranks = request.getfixturevalue("two") if count == 2 else Ranks(tmp_path, count, tiny.words(), ())
    parts = build_components(tiny.recipe(data="digits", losses="ce"), None, Silent(), SharedResources())
    single = {"batch_size": 8, "bf16": False, "progress": Silent(), "what": "digits"}
    whole = evaluate(parts.student, parts.views.val, accelerator(), **single).predictions_N
    right = whole == parts.views.val.split.labels
    for noted in ranks.noted:
        for size, (correct, seen, accuracy, predictions) in zip(SIZES, noted["evaluated"], strict=True):
            assert (seen, predictions) == (size, whole[:size].tolist())
            assert (correct, accuracy) == (right[:size].sum(), np.mean(right[:size]))
            figure("evaluations on 2 and 3 processes with the exact count and the metrics of one", 1, 1)


@pytest.mark.guarantee(3)
def test_devices_and_accelerate_launch_give_the_task_of_one_process(
    tiny: Any, tmp_path: Path, start_process: Start, history: History, figure: Callable[..., None]
) -> None:
    """The same global batch, dropout on: float sums in another order is all that may differ."""
    settings = ("data.augment=shift_flip", "train.accumulation=2")
    words = {"losses": "ce,kd,attention,feature"}
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["distill", *tiny.arguments(*settings, **words), "--json"]
    devices = ["remap_cli", *arguments, "--devices=2", f"--output={tmp_path / 'devices'}"]
    accelerate = ["accelerate.commands.launch", "--config_file", str(tmp_path / "config.yaml"), "-m", "remap_cli"]
    accelerate += [*arguments, f"--output={tmp_path / 'accelerate'}"]
    expected = start(tiny.recipe(*settings, **words), tmp_path / "one")
    for name, command in (("devices", devices), ("accelerate", accelerate)):
        process = start_process(*command)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        summary = json.loads(output)  # one object: only the first process prints
        assert (summary["processes"], summary["precision"]) == (2, "fp32")
        for field in ("correct", "accuracy", "initial_accuracy"):
            assert summary["student"][field] == expected.summary["student"][field]
        assert summary["teacher"]["accuracy"] == expected.summary["teacher"]["accuracy"]
        difference = _difference(_tensors(tmp_path / name), _tensors(tmp_path / "one"))
        assert difference < 1e-5, name
        for ours, theirs in zip(history(tmp_path / "one"), history(tmp_path / name), strict=True):
            assert theirs == pytest.approx(ours, abs=1e-5)
        # The command also writes the page about its run; a run from Python leaves that to its caller.
        assert _names(tmp_path / name) - {"report.html"} == _names(tmp_path / "one")
        figure(f"largest difference of weights, two processes ({name}) and one", difference)
    told = (tmp_path / "devices" / "command.txt").read_text()
    assert told == f"python -m {' '.join(devices)}\n"  # the user's words, not those of a launcher


@pytest.mark.guarantee(24)
def test_a_killed_process_ends_all_and_a_silent_one_too(
    tiny: Any, tmp_path: Path, start_process: Start, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    """SIGKILL to one of two; then the run goes on, and one of them is halted by SIGSTOP."""
    monkeypatch.setenv("REMAP_TIMEOUT", "5")
    run = tmp_path / "run"
    process = start_process("remap_cli", "distill", *tiny.arguments(*LONG), "--devices=2", f"--output={run}")
    _wait_for_epochs(run, process, 2)
    seconds, errors = _end(process, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: [process 1] was ended by SIGKILL" in errors
    assert errors.count("error:") == 1 and "Traceback" not in errors and "gloo" not in errors
    assert seconds < 60
    figure("seconds from SIGKILL of one process to the end of all", round(seconds, 1))

    done = _epochs(run)
    process = start_process("remap_cli", "distill", "--resume", str(run))  # with as many as before
    _wait_for_epochs(run, process, done + 2)
    seconds, errors = _end(process, signal.SIGSTOP)
    assert process.returncode == 3
    assert "error: another process of this run does not answer" in errors
    assert errors.count("error:") == 1 and "Traceback" not in errors
    assert 5 <= seconds < 120  # a halted process gets the launcher's 30 s for leaving
    figure("seconds from SIGSTOP of one process to the end of all, REMAP_TIMEOUT=5", round(seconds, 1))


@pytest.mark.guarantee(24)
def test_an_error_of_one_process_is_what_the_user_sees(tiny: Any, tmp_path: Path) -> None:
    """The first process meets a broken connection, which is not the news."""
    worker = [sys.executable, str(WORKERS / "one_fails.py")]
    code, output, errors = _run([*worker, "distill", *tiny.arguments(), "--devices=2", f"--output={tmp_path / 'run'}"])
    assert (code, output) == (2, "")
    assert "error: [process 1] the disk of this machine is gone\n  given:   /data\n" in errors
    assert errors.count("error:") == 1 and "Traceback" not in errors


def _run(command: list[str]) -> tuple[int, str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def _end(process: subprocess.Popen, number: int) -> tuple[float, str]:
    """Send a signal to the second process of a command; seconds until the command has ended, and its messages."""
    children = _children(process.pid)
    assert len(children) == 2
    started = time.monotonic()
    os.kill(children[1], number)
    _, errors = process.communicate(timeout=200)
    seconds = time.monotonic() - started
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    return seconds, errors


def _children(pid: int) -> list[int]:
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _wait_for_epochs(run: Path, process: subprocess.Popen, count: int) -> None:
    deadline = time.monotonic() + 200
    while _epochs(run) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _epochs(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(RunDir(run).task / "task.safetensors")


def _difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}
