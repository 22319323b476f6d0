"""Cells side by side: the same tasks and table as one after the other, and what a process that ends takes with it."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from remap.cache import shared_outputs
from remap.cache.shared_outputs import FOLDER, SharedOutputs
from remap.cache.teacher_cache import InMemory
from remap.distributed import device_memory
from remap.distributed.interrupts import watch_signals
from remap.errors import DiskFull, Interrupted, RecipeError, RunError
from remap.pipeline import comparison_jobs as jobs
from remap.pipeline import comparison_slurm, teacher_outputs
from remap.pipeline import comparison_workers as workers
from remap.pipeline.compare import Plan, compare
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import Recipe

METHODS = ["linear", "bitfit"]
SETTINGS = ("teacher.prepare=full", "teacher.epochs=1", "teacher.allow_weak=true", "train.checkpoint_seconds=0")
# What a table says of time and memory, and of its own folder.
MEASURED = {"seconds", "step_seconds", "peak_memory_bytes", "output"}
SECOND = "bitfit-teacher-s0"


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork this process, which has imported everything and runs one thread."""
    monkeypatch.setattr(workers, "START_METHOD", "fork")


@pytest.fixture(scope="module")
def recipe(tiny: Any) -> Recipe:
    return tiny.recipe(*SETTINGS, losses="ce,kd")


@pytest.fixture(scope="module")
def alone(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs") / "alone"
    compare(recipe, METHODS, 1, folder, Silent())
    return folder


def _tasks(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/task/task.safetensors")}


def _compared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _compared(one) for key, one in value.items() if key not in MEASURED}
    return [_compared(one) for one in value] if isinstance(value, list) else value


def _table(folder: Path) -> Any:
    return _compared(json.loads((folder / "compare.json").read_text()))


def test_cells_side_by_side_give_the_same_bits(
    recipe: Recipe, alone: Path, tmp_path: Path, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, compute, computed = watch(lambda step: None), teacher_outputs.cache_in_memory, tmp_path / "computed"

    def counted(*words: Any) -> InMemory:
        with computed.open("a") as file:
            file.write("x")
        return compute(*words)

    monkeypatch.setattr(teacher_outputs, "cache_in_memory", counted)
    compare(recipe, METHODS, 1, tmp_path / "two", progress, Plan(jobs="2"))
    assert len(_tasks(alone)) == 5 and _tasks(tmp_path / "two") == _tasks(alone)
    assert _table(tmp_path / "two") == _table(alone)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in alone.iterdir()}
    assert any(text.startswith("2 cells side by side, ") for text in progress.said)
    assert sum("tuning it" in text for text in progress.said) == 1, "the teacher is prepared before the first cell"
    assert computed.read_text() == "x", "the outputs are computed once for both processes"


def test_teachers_of_folds_are_prepared_once_for_cells_side_by_side(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = tiny.recipe(*SETTINGS, "teacher.folds=2", losses="ce,kd"), watch(lambda step: None)
    compare(recipe, ["linear"], 2, tmp_path / "one", Silent())
    compare(recipe, ["linear"], 2, tmp_path / "two", said, Plan(jobs="2"))
    tasks = _tasks(tmp_path / "one")
    assert {"teacher/task/task.safetensors", "teacher-fold-2/task/task.safetensors"} < tasks.keys()
    assert _tasks(tmp_path / "two") == tasks and _table(tmp_path / "two") == _table(tmp_path / "one")
    assert any(text.startswith("2 cells side by side, ") for text in said.said)
    monkeypatch.setattr(SharedResources, "index", lambda *_: pytest.fail("a finished comparison needs no images"))
    compare(recipe, ["linear"], 2, tmp_path / "two", Silent())


def test_the_teacher_is_prepared_first_whatever_the_first_cell_learns_from(
    recipe: Recipe, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    """The first loss set reads no logits: two cells of the second one began the same teacher, and one failed."""
    progress = watch(lambda step: None)
    compare(recipe, ["linear"], 1, tmp_path / "sets", progress, Plan(jobs="2", loss_sets=["ce,feature", "ce,kd"]))
    (tuned,) = [text for text in progress.said if "tuning it" in text]
    (begun,) = [text for text in progress.said if text.startswith("2 cells side by side, ")]
    assert progress.said.index(tuned) < progress.said.index(begun)


def test_a_process_that_is_killed_loses_its_cell_alone(
    recipe: Recipe, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = workers.run, tmp_path / "killed"

    def killed(one: Recipe, run_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if run_dir.path.name == SECOND:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(one, run_dir, *args, **kwargs)

    monkeypatch.setattr(workers, "run", killed)
    with pytest.raises(RunError, match="1 of 4 cells failed; the others are finished") as caught:
        compare(recipe, METHODS, 1, folder, Silent(), Plan(jobs="2"))
    assert f"{SECOND}: its process ended with exit code -9; the system kills" in str(caught.value)
    assert "start the same comparison again" in str(caught.value)
    assert {path.parent.name for path in folder.glob("*/summary.json")} == {
        path.parent.name for path in alone.glob("*/summary.json")
    } - {SECOND}
    monkeypatch.setattr(workers, "run", run)
    compare(recipe, METHODS, 1, folder, Silent())
    assert _tasks(folder) == _tasks(alone)


def test_a_cell_that_fails_in_one_process_leaves_the_others_alone(
    recipe: Recipe, alone: Path, tmp_path: Path, watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of cells one after the other, too; a failure of the first ends all, for the others would lack the same."""
    run, folder, progress = workers.run, tmp_path / "c", watch(lambda step: None)

    def failing(name: str) -> Callable[..., Any]:
        def one(recipe: Recipe, run_dir: Any, *args: Any, **kwargs: Any) -> Any:
            if run_dir.path.name == name:
                raise RunError(f"{name} does not work")
            return run(recipe, run_dir, *args, **kwargs)

        return one

    monkeypatch.setattr(workers, "run", failing(SECOND))
    with pytest.raises(RunError, match="1 of 4 cells failed; the others are finished") as caught:
        compare(recipe, METHODS, 1, folder, progress, Plan(jobs="1"))
    assert f"{SECOND}: {SECOND} does not work" in str(caught.value)
    assert f"{SECOND} failed: {SECOND} does not work" in progress.said
    monkeypatch.setattr(workers, "run", run)
    compare(recipe, METHODS, 1, folder, Silent())
    assert _tasks(folder) == _tasks(alone)
    first = next(text.removeprefix("[1/4] ") for text in progress.said if text.startswith("[1/4] "))
    monkeypatch.setattr(workers, "run", failing(first))
    with pytest.raises(RunError, match=f"^{first} does not work"):
        compare(recipe, METHODS, 1, tmp_path / "d", Silent(), Plan(jobs="1"))
    assert not list((tmp_path / "d").glob("*/summary.json"))


def test_a_cell_that_fails_is_named_with_its_reason(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(one: Recipe, run_dir: Any, *_: Any, **__: Any) -> Any:
        raise RunError(f"{run_dir.path.name} does not work") if one.teachers else ValueError("a bug")

    monkeypatch.setattr(jobs, "prepare_teachers", lambda *_: None)
    monkeypatch.setattr(workers, "run", failing)
    with pytest.raises(RunError, match="2 of 2 cells failed") as caught:
        compare(recipe, ["linear"], 1, tmp_path / "c", Silent(), Plan(jobs="2"))
    assert "linear-teacher-s0" in str(caught.value) and "linear-alone-s0" in str(caught.value)


def test_a_signal_stops_all_processes_which_save_their_state(
    recipe: Recipe, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run, parent = tmp_path / "stopped", workers.run, os.getpid()

    def stopping(one: Recipe, run_dir: Any, progress: Any, *args: Any, **kwargs: Any) -> Any:
        if os.getpid() == parent:
            return run(one, run_dir, progress, *args, **kwargs)

        def say(text: str) -> None:
            if run_dir.path.name == SECOND and "epoch 1" in text:
                os.kill(parent, signal.SIGTERM)

        progress.say = say
        return run(one, run_dir, progress, *args, **kwargs)

    monkeypatch.setattr(workers, "run", stopping)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        compare(recipe, METHODS, 1, folder, Silent(), Plan(jobs="2"))
    assert f"remap compare ... --output {folder}" in (caught.value.do or "") and caught.value.exit_code == 143
    assert not workers.multiprocessing.active_children()
    monkeypatch.setattr(workers, "run", run)
    compare(recipe, METHODS, 1, folder, Silent(), Plan(jobs="2"))
    assert _tasks(folder) == _tasks(alone)


def test_few_steps_do_not_pay_for_processes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]
) -> None:
    monkeypatch.setattr(jobs, "Pool", None)
    progress = watch(lambda step: None)
    compare(recipe, ["linear"], 1, tmp_path / "c", progress, Plan(jobs="auto"))
    assert not any("side by side" in text for text in progress.said)


@pytest.mark.parametrize(
    ("cores", "free_gib", "cells", "slots"),
    [(8, 100, 24, [1] * 8), (8, 100, 3, [2] * 3), (8, 12, 24, [2] * 4), (2, 0, 24, [2])],
)
def test_cores_and_memory_decide_how_many_cells_run(
    monkeypatch: pytest.MonkeyPatch, cores: int, free_gib: int, cells: int, slots: list[int]
) -> None:
    """Of 12 GiB, 80 % hold four processes of 1 + 1 GiB."""
    monkeypatch.setattr(jobs, "cores", lambda: cores)
    monkeypatch.setattr(jobs, "free_bytes", lambda: free_gib * 2**30)
    monkeypatch.setattr(jobs, "peak_bytes", lambda _: 2**30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert [slot.threads for slot in jobs.auto_slots([None] * cells, Silent())] == slots  # type: ignore[list-item]


def test_cells_are_divided_among_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "cores", lambda: 16)
    monkeypatch.setattr(jobs, "_gpus", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert [(slot.threads, slot.gpu) for slot in jobs.slots_of(4)] == [(4, 0), (4, 1), (4, 0), (4, 1)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert workers._visible(1) == "5"


def test_tasks_of_a_job_array_give_the_same_bits(
    recipe: Recipe, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By submitit's executor for a machine without SLURM, which runs a task where its result is asked for."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(comparison_slurm, "LOOK_EVERY_S", 0.0)
    compare(recipe, METHODS, 1, tmp_path / "array", Silent(), Plan(slurm="cluster=debug,timeout_min=5"))
    assert _tasks(tmp_path / "array") == _tasks(alone) and _table(tmp_path / "array") == _table(alone)


@pytest.mark.parametrize("words", ["gpu", "cluster=debug,no_such_word=1", "cluster=nowhere"])
def test_words_for_slurm_that_cannot_be_used(recipe: Recipe, tmp_path: Path, words: str) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(RecipeError, match="--slurm: "):
        compare(recipe, ["linear"], 1, tmp_path / "c", Silent(), Plan(slurm=words))


@pytest.mark.parametrize("word", ["0", "-1", "two", ""])
def test_a_number_that_is_none(recipe: Recipe, tmp_path: Path, word: str) -> None:
    with pytest.raises(RecipeError, match=r"--jobs .*allowed: auto, or 1 and more"):
        compare(recipe, ["linear"], 1, tmp_path / "c", Silent(), Plan(jobs=word))


def test_minutes_are_for_cells_that_run_alone(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has the machine to itself"):
        compare(recipe, ["linear"], 1, tmp_path / "c", Silent(), Plan(jobs="2", budget="minutes=1"))


def test_outputs_of_one_process_are_those_of_the_others(tmp_path: Path) -> None:
    first, second = SharedOutputs(tmp_path), SharedOutputs(tmp_path)
    outputs, rows = InMemory(), torch.tensor([2, 0]).numpy()
    outputs.put(1, rows, {"logits": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, 3)
    assert ("a", 1) not in first
    first["a", 1] = outputs
    assert ("a", 1) in second and ("a", 2) not in second
    assert torch.equal(second["a", 1].rows(rows, 1)["logits"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_outputs_that_a_killed_comparison_left_are_not_read(tmp_path: Path) -> None:
    """Its images may have been changed since."""
    outputs = SharedOutputs(tmp_path / FOLDER)
    assert ("a", 1) not in outputs
    outputs["a", 1] = InMemory()
    jobs.prepare_teachers([], tmp_path, None, Silent())  # type: ignore[arg-type]
    assert ("a", 1) not in SharedOutputs(tmp_path / FOLDER)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., workers.Pool]:
    """Makes a pool of one process whose cells are functions."""
    monkeypatch.setattr(workers, "Resources", lambda *_: None)

    def pool(run_cell: Callable[..., float]) -> workers.Pool:
        monkeypatch.setattr(workers, "run_cell", run_cell)
        return workers.Pool([workers.Slot(1)], tmp_path, None, Silent())  # type: ignore[arg-type]

    return pool


CELLS = [SimpleNamespace(name=name) for name in "abc"]


def test_a_process_that_ends_between_two_cells_costs_none(
    light: Callable[..., workers.Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear, killed = workers.Pool._hear, []

    def run_cell(cell: Any, *_: Any) -> float:
        with (tmp_path / "ran").open("a") as file:
            file.write(cell.name)
        return 0.5

    def then_kill(pool: workers.Pool, connection: Any, shown: Any) -> None:
        worker = pool._workers[connection]
        hear(pool, connection, shown)
        if worker.has_begun and worker.cell is None and not killed:
            killed.append(worker.process.kill())
            worker.process.join()

    monkeypatch.setattr(workers.Pool, "_hear", then_kill)
    light(run_cell).run(CELLS)  # type: ignore[arg-type]
    assert killed and (tmp_path / "ran").read_text() == "abc"


def test_a_process_that_cannot_begin_fails_its_cells(
    light: Callable[..., workers.Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = light(lambda *_: 0.5)
    monkeypatch.setattr(workers, "Resources", lambda *_: os._exit(7))
    with pytest.raises(RunError, match="3 of 3 cells failed") as caught:
        pool.run(CELLS)  # type: ignore[arg-type]
    assert "its process ended with exit code 7" in str(caught.value)


def test_a_cell_that_says_much_while_it_is_stopped_saves_its_state(
    light: Callable[..., workers.Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far more than a pipe holds (64 KiB), which nobody would read after the signal."""
    parent = os.getpid()

    def run_cell(cell: Any, output: Path, resources: Any, progress: Any) -> float:
        try:
            os.kill(parent, signal.SIGTERM)
            time.sleep(60)
        except Interrupted:
            for _ in range(200):
                progress.say(1000 * "x")
            (tmp_path / "saved").touch()
            raise
        return 0.5

    monkeypatch.setattr(workers, "SAVING_S", 10.0)
    with pytest.raises(Interrupted), watch_signals():
        light(run_cell).run(CELLS[:1])  # type: ignore[arg-type]
    assert (tmp_path / "saved").exists() and not workers.multiprocessing.active_children()


def test_a_cell_that_ends_in_spite_of_the_signal_ends_its_process(
    light: Callable[..., workers.Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came after the last look at signals; the process would wait for another cell until it is killed."""
    parent = os.getpid()

    def run_cell(cell: Any, output: Path, resources: Any, progress: Any) -> float:
        with suppress(Interrupted):
            os.kill(parent, signal.SIGTERM)
            time.sleep(60)
        return 0.5

    ended: list[int] = []
    monkeypatch.setattr(workers, "SAVING_S", 30.0)
    with pytest.raises(Interrupted), watch_signals():
        pool = light(run_cell)
        try:
            pool.run(CELLS[:1])  # type: ignore[arg-type]
        finally:
            ended = [worker.process.exitcode for worker in pool._workers.values()]
    assert ended == [0], "a process that is killed has the exit code -9"


def test_outputs_that_find_no_room_are_computed_by_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise DiskFull("no room")

    monkeypatch.setattr(shared_outputs.atomic_write, "write_bytes", full)
    first, second = SharedOutputs(tmp_path), SharedOutputs(tmp_path)
    assert ("a", 1) not in first
    first["a", 1] = InMemory()
    assert ("a", 1) in first and ("a", 1) not in second, "which would wait here if the first one held its lock"


GIB = 2**30


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("1:name=systemd:/a", {}, 8 * GIB),
        # Of the limit of a job, less what it uses; a quarter of that are cached files. An inner group is without one.
        (
            "0::/job/step",
            {
                **{"job/memory.max": 4 * GIB, "job/memory.current": 2 * GIB, "job/memory.stat": f"inactive_file {GIB}"},
                **{"job/step/memory.max": "max", "job/step/memory.current": GIB, "job/step/memory.stat": "anon 1"},
            },
            3 * GIB,
        ),
        # Version 1 in a container, where the group's own path is not there.
        (
            "3:cpu:/a\n4:hugetlb,memory:/docker/ab\n0::/",
            {
                **{"memory/memory.limit_in_bytes": 3 * GIB, "memory/memory.usage_in_bytes": GIB},
                "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 0",
            },
            2 * GIB,
        ),
        ("0::/", {"memory.max": GIB, "memory.current": 2 * GIB, "memory.stat": "x 0"}, 0),
    ],
)
def test_free_memory_is_what_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, Any], free: int
) -> None:
    """By the kernel's documents (cgroup-v2, cgroup-v1/memory, proc); 8 GiB without any, of a kernel before 3.14."""
    meminfo = f"MemTotal: {16 * 2**20} kB\nMemFree: {5 * 2**20} kB\nBuffers: {2**20} kB\nCached: {2 * 2**20} kB"
    for name, text in {"self/cgroup": groups, "meminfo": meminfo, **{f"g/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(device_memory, "PROC", tmp_path)
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path / "g")
    assert device_memory.free_bytes() == free


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (EOFError(), "refuses"),
    ],
)
def test_a_process_that_the_system_refuses_is_one_error(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    """By itself, or through the fork server, of which there is no more than the end of a file."""

    def refused(**_: Any) -> None:
        raise error

    pool = workers.Pool([workers.Slot(1)], tmp_path, tiny.recipe(), Silent())
    monkeypatch.setattr(pool, "_context", SimpleNamespace(Pipe=multiprocessing.Pipe, Process=refused))
    with pytest.raises(RunError, match=f"cannot start another process for the cells, beside 0: .*{says}") as caught:
        pool.run([SimpleNamespace(name="cell")])  # type: ignore[list-item]
    assert "--jobs N" in (caught.value.do or "")
