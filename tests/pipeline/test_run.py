"""Whole runs: shared teacher outputs, evaluation of what was saved, and what a run leaves on a disk."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from remap.distributed.launch import accelerator
from remap.engine.evaluation_pass import evaluate
from remap.errors import RecipeError, RunError, ThreadRefused
from remap.io import disk_space
from remap.pipeline.dry_run import estimate
from remap.pipeline.run import as_recipe, distill, resume, start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task


def test_settings_in_python_are_those_of_the_command_line(tiny: Any) -> None:
    settings = ["data.mixup=0.8", "losses.kd.temperature=2"]
    recipe = as_recipe(tiny.words(losses="ce,kd"), settings)
    assert recipe.data.mixup == 0.8 and recipe.losses[1].options == {"temperature": 2}
    with pytest.raises(RecipeError, match="settings"):
        as_recipe(recipe, settings)


@pytest.mark.parametrize("losses", ["ce,kd,attention", "ce,feature,dist"])
def test_kept_teacher_outputs_train_the_student_of_an_online_teacher(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], losses: str
) -> None:
    kept = start(tiny.recipe(losses=losses), tmp_path / "kept")
    online = start(tiny.recipe("teacher.cache=off", losses=losses), tmp_path / "online")
    assert largest_difference(kept.student.trained, online.student.trained) == 0.0
    assert kept.summary["student"]["correct"] == online.summary["student"]["correct"]
    assert kept.summary["final_losses"] == online.summary["final_losses"]


@pytest.mark.usefixtures("two_passes")
def test_kept_outputs_are_worth_it(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 images, batches of 8: three teacher batches once (and one to size memory), or one in each of six steps."""
    from remap.remapping.objective import Objective

    calls = [0]
    keep = Objective.targets

    def count(self: Objective, *arguments: Any) -> Any:
        calls[0] += 1
        return keep(self, *arguments)

    monkeypatch.setattr(Objective, "targets", count)
    start(tiny.recipe(), tmp_path / "kept")
    assert calls[0] == 1 + 3
    calls[0] = 0
    start(tiny.recipe("data.augment=shift"), tmp_path / "online")
    assert calls[0] == 6


@pytest.mark.slow
def test_runs_on_one_bench_equal_runs_alone(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float]
) -> None:
    """A shared teacher carries nothing from one run to the next, and no hook stays on it."""
    bench = SharedResources()
    for number, method in enumerate(("vpt_deep", "adaptformer", "vpt_deep")):
        recipe = tiny.recipe(method=method)
        together = start(recipe, tmp_path / f"together{number}", shared=bench)
        alone = start(recipe, tmp_path / f"alone{number}")
        assert largest_difference(together.student.trained, alone.student.trained) == 0.0
    teacher = next(iter(bench.teachers.values())).network.model
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.guarantee(19)
@pytest.mark.parametrize("method", ["vpt_deep", "adaptformer", "full"])
def test_the_saved_student_repeats_the_summary(tiny: Any, tmp_path: Path, method: str) -> None:
    """Loaded anew and evaluated on the same images: the same count, to the image."""
    bench = SharedResources()
    recipe = tiny.recipe("train.lr=0.001", method=method)
    result = start(recipe, tmp_path / "run", shared=bench)
    network, view = load_task(tmp_path / "run")
    source = bench.open(recipe.data, view, Silent()).val
    found = evaluate(network, source, accelerator(), batch_size=64, bf16=False, progress=Silent(), what="x")
    assert (found.correct, found.count) == (result.summary["student"]["correct"], 9)
    assert found.accuracy == result.summary["student"]["accuracy"]


def test_a_run_leaves_what_the_directory_promises(tiny: Any, tmp_path: Path, history: Callable[..., list]) -> None:
    result = distill(tiny.recipe("train.epochs=3", "train.eval_every=2"), output=tmp_path / "run")
    run = RunDir(tmp_path / "run")
    for name in ("recipe.yaml", "command.txt", "environment.json", "status.json", "metrics.jsonl", "summary.json"):
        assert (run.path / name).is_file(), name
    assert run.recipe() == tiny.recipe("train.epochs=3", "train.eval_every=2", "data.depth=1").written_out()
    assert run.is_done and run.summary() == result.summary
    assert [("accuracy" in record) for record in history(run.path)] == [False, True, True]
    assert not list(run.path.rglob("*.tmp"))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="exists already; nothing in it was touched"):
        distill(tiny.recipe(), output=tmp_path / "run")
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [{"method": "full", "losses": "ce,kd,feature"}, {"teacher": "ema"}])
def test_the_dry_run_counts_the_disk_that_the_run_asks_for(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, str]
) -> None:
    """Source: the tensors of a checkpoint as safetensors reads them; the step counts of AdamW left out."""
    recipe, asked = tiny.recipe(**words), list[int]()
    monkeypatch.setattr(disk_space, "require_space", lambda place, needed, what: asked.append(needed))
    said = estimate(recipe, Silent())["estimate"]
    run = start(recipe, tmp_path / "run").run_dir
    sizes = {"parameter": 0, "optimizer": 0}
    for name, tensor in load_file(max((run / "checkpoint").glob("*.safetensors"))).items():
        if not name.startswith("optimizer/step/") and name.partition("/")[0] in sizes:
            sizes[name.partition("/")[0]] += tensor.nbytes
    expected = 3 * sum(sizes.values()) + sizes["parameter"]
    *heads, needed = asked  # the teacher's fitted head is stored before
    assert needed == said["run_bytes"] == expected
    assert len(heads) <= 1 and sum(heads) < 2**16
    assert said["disk_bytes"] >= expected > said["task_bytes"]


def test_a_folder_that_cannot_be_written_is_named(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot make .*file/run"):
        start(tiny.recipe(), tmp_path / "file" / "run")


def test_a_directory_that_is_being_worked_in_is_left_alone(tiny: Any, tmp_path: Path, watch: Any) -> None:
    """Resumed a second time while it runs; the first goes on as if nothing had happened."""
    run, refused = tmp_path / "run", []

    def intrude(done: int) -> None:
        if done == 2:
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            with pytest.raises(RunError, match="another process is working in") as caught:
                resume(run)
            refused.append(caught.value)
            assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    result = start(tiny.recipe(), run, watch(intrude))
    assert f"touch {run / 'stop'}" in str(refused[0])
    assert result.summary["student"] == {**start(tiny.recipe(), tmp_path / "twin").summary["student"]}


def test_a_run_that_is_refused_a_thread_says_how_it_goes_on(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ThreadRefused) as caught:
        patch.setattr(threading.Thread, "start", refuse)
        start(tiny.recipe(method="bitfit", losses="ce", teacher=None), path)
    assert f"then resume with: remap tune --resume {path}" in str(caught.value)
    assert RunDir(path).status() == "failed"
    resume(path)
    assert RunDir(path).is_done
