"""What is decided about sharding. That it gives what one process gives is in tests/reliability/test_sharding.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from remap.distributed import sharding
from remap.distributed.sharding import bytes_held, copy_full_, gather_full, is_sharded, shard_like, wants_sharding
from remap.engine import step, training
from remap.errors import RecipeError, TrainingError
from remap.pipeline.run import start
from remap.recipe.schema import Recipe
from remap.runs.task import load_task


def test_one_process_has_nothing_to_share(tiny: Any, tmp_path: Path, watch: Any) -> None:
    """It says so, and gives the bytes of a run without."""
    reporter = watch(lambda steps: None)
    shared = start(tiny.recipe("train.parallel=fsdp2", "teacher.shard=on"), tmp_path / "shared", reporter)
    start(tiny.recipe(), tmp_path / "plain")
    assert [said for said in reporter.said if "train.parallel=fsdp2 has no effect with one process" in said]
    tasks = [(tmp_path / name / "task" / "task.safetensors").read_bytes() for name in ("shared", "plain")]
    assert tasks[0] == tasks[1]
    assert not is_sharded(shared.student)


def test_who_holds_what_changes_no_digest(tiny: Any) -> None:
    def digest(recipe: Recipe) -> str:
        return recipe.digest()

    two = f"{tiny.teacher},{tiny.teacher}"
    assert digest(tiny.recipe("train.parallel=fsdp2", "teacher.shard=on")) == digest(tiny.recipe())
    plain, shared = tiny.recipe(teacher=two), tiny.recipe("teacher.shard=off", teacher=two)
    assert shared.teacher.shard == "off" and digest(shared) == digest(plain)
    sharded = tuple(spec.model_copy(update={"shard": "on"}) for spec in plain.teachers)
    assert digest(plain.model_copy(update={"teachers": sharded})) == digest(plain)
    assert digest(tiny.recipe("train.weight_decay=0.5")) != digest(tiny.recipe())


@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_a_teacher_made_of_the_student_goes_with_it(tiny: Any, teacher: str) -> None:
    with pytest.raises(RecipeError, match=f"teacher.shard: the teacher '{teacher}' is sharded with the student"):
        tiny.recipe("teacher.shard=on", teacher=teacher)


@pytest.mark.parametrize(
    ("processes", "device", "free", "setting", "expected"),
    [
        (1, "cuda", 0, "on", False),
        (2, "cpu", 0, "on", True),
        (2, "cpu", 0, "auto", False),
        (2, "cuda", 0, "off", False),
        (2, "cuda", 1.9, "auto", True),
        (2, "cuda", 2.1, "auto", False),
    ],
)
def test_a_large_teacher_is_sharded_by_itself(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    device: str,
    free: float,
    setting: str,
    expected: bool,
) -> None:
    """``free`` in sizes of the teacher; the bound is half of it."""
    run = start(tiny.recipe("train.epochs=1", method="linear", losses="ce", teacher=None), tmp_path / "run").run_dir
    teacher, _ = load_task(run)
    nbytes = sum(4 * parameter.numel() for parameter in teacher.model.parameters())
    assert bytes_held(teacher) == nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * nbytes), 0))
    monkeypatch.setattr(sharding, "all_reduce_max", lambda accelerator, *values: values)
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
    assert wants_sharding(teacher, setting, accelerator) is expected


def test_out_of_memory_with_sharded_weights_ends_the_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other processes are in the middle of a pass: nothing can be agreed with them."""

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(training, "is_sharded", lambda network: True)
    monkeypatch.setattr(step, "inputs_of", full)
    with pytest.raises(TrainingError, match="cannot be done again in smaller parts") as caught:
        start(tiny.recipe(), tmp_path / "run")
    assert "no room" in str(caught.value) and "train.accumulation" in str(caught.value)


def test_what_is_not_sharded_is_left_as_it_is() -> None:
    tensor, value = torch.zeros(3), torch.arange(3.0)
    assert gather_full(tensor) is tensor and shard_like(value, tensor) is value
    copy_full_(tensor, value)
    assert torch.equal(tensor, value)
