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
