"""Shipped recipes whose parts must fit each other, run on the tiny pair."""

from pathlib import Path
from typing import Any

import torch

from remap.pipeline import run
from remap.recipe import resolve


def test_wecolora_copies_blocks_and_adapts_all_layers(tiny: Any, tmp_path: Path) -> None:
    """One step of the recipe: the tiny teacher has three blocks, of which the first and the last are left."""
    settings = ["data.labels=8", "train.epochs=1", "train.batch_size=8", "method.rank=2", "data.workers=1"]
    words = {"data": tiny.data, "teacher": tiny.teacher}
    student = run.start(resolve("wecolora", words=words, settings=settings), tmp_path / "run").student
    blocks = student.anatomy.blocks
    assert len(blocks) == 2 and student.anatomy.width == 24
    layers = {name.split(".remap_lora")[0].split("blocks.")[1] for name in student.attached.trainable}
    assert layers == {f"{b}.{path}" for b in (0, 1) for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    ups = [value for name, value in student.attached.state().items() if name.endswith(".up")]
    assert all(torch.any(up != 0) for up in ups), "the losses reach every adapter"


def test_slad_trains_teacher_and_student_with_common_cores(tiny: Any, tmp_path: Path) -> None:
    """One epoch of the recipe on the tiny pair, whose teacher knows nothing yet."""
    settings = ["data.labels=8", "train.epochs=1", "train.batch_size=8", "method.rank=2", "teacher.allow_weak=true"]
    words = {"data": tiny.data, "teacher": tiny.teacher, "student": tiny.student}
    recipe = resolve("slad", words=words, settings=settings)
    assert recipe.teacher is not None and recipe.teacher.joint
    result = run.start(recipe, tmp_path / "run")
    assert result.summary["teacher"]["outputs"] == "each step"
    cores = [value for name, value in result.student.attached.state().items() if name.endswith(".core")]
    assert len(cores) == 2 * 4 and all(core.shape[1:] == (2, 2) for core in cores)
