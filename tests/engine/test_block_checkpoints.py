"""Gradient checkpointing: the same bits with less memory. Source: the same run or pass without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from remap.engine.block_checkpoints import checkpointed_blocks
from remap.errors import RecipeError
from remap.network import Runner
from remap.pipeline.components import build_components
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.runs.run_dir import RunDir


# The tiny student has dropout and drop-path in its blocks; attention and tokens are read inside and behind them.
@pytest.mark.parametrize("method", ["full", "vpt_deep+adaptformer+lora"])
def test_a_run_ends_with_the_same_bits(
    tiny: Any, tmp_path: Path, largest_difference: Callable[..., float], method: str
) -> None:
    settings = ["method.adaptformer.dropout=0.1"] if "adaptformer" in method else []
    words = {"method": method, "losses": "ce,kd,attention,tokens"}
    plain = start(tiny.recipe(*settings, **words), tmp_path / "plain")
    saved = start(tiny.recipe(*settings, "train.checkpoint_blocks=true", **words), tmp_path / "saved")
    assert largest_difference(plain.student.tensors, saved.student.tensors) == 0.0
    assert "forward" not in saved.student.model.get_submodule("blocks.0").__dict__


def test_less_is_saved_for_the_backward_pass(tiny: Any, tmp_path: Path) -> None:
    """What is saved between the passes: without checkpoints all activations, with them the inputs of the blocks."""
    recipe = tiny.recipe(method="full", losses="ce", teacher=None)
    student = build_components(recipe, RunDir.create(tmp_path / "run", recipe), Silent(), SharedResources()).student
    images, runner = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8), Runner(student)

    def saved() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept_alive = runner(images).logits_BC
        assert kept_alive.requires_grad
        return sum(sizes.values())

    student.attached.train()
    plain = saved()
    with checkpointed_blocks(student):
        assert 0 < saved() < plain / 3


def test_compiled_blocks_are_refused(tiny: Any) -> None:
    with pytest.raises(RecipeError, match="leave one of the two out"):
        tiny.recipe("train.checkpoint_blocks=true", "train.compile=true")
