"""The optimisers of ``train.optimizer``: what they compute, and that their whole state is in a checkpoint."""

import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remap.engine.checkpoint import load_checkpoint, save_checkpoint, snapshot
from remap.engine.optim import make_optimizer
from remap.engine.state import State
from remap.errors import RecipeError, RunError
from remap.pipeline.run import start
from remap.recipe.sections import Optimizer

NAMES = typing.get_args(Optimizer)


class Few:
    """What ``make_optimizer`` reads of a network: a matrix, a vector, a kernel and a number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shapes = {"matrix": (6, 4), "vector": (4,), "kernel": (3, 2, 2, 2), "number": ()}
        self.trained = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
        self.attached = self
        self.no_decay = ()


def _train(few: Few, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        for parameter in few.trained.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def _made(name: str) -> tuple[Few, torch.optim.Optimizer]:
    few: Any = Few()
    return few, make_optimizer(few, [], 1e-2, 0.1, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimiser_goes_on_from_a_checkpoint_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Source: the same steps without a checkpoint. Files are safetensors; nothing else is read back."""
    few, optimizer = _made(name)
    _train(few, optimizer, range(6))
    save_checkpoint(tmp_path, State("abc", step=6), snapshot(few.trained, optimizer))
    again, other = _made(name)
    _train(again, other, range(3, 4))  # of a run that goes back
    load_checkpoint(tmp_path, "abc", again.trained, other, print)
    _train(few, optimizer, range(6, 11))
    _train(again, other, range(6, 11))
    for key, parameter in few.trained.items():
        assert torch.isfinite(parameter).all() and torch.equal(again.trained[key], parameter), key


def test_the_state_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    few, optimizer = _made("lion")
    _train(few, optimizer, range(2))
    save_checkpoint(tmp_path, State("abc"), snapshot(few.trained, optimizer))
    with pytest.raises(RunError, match="does not fit this model"):
        load_checkpoint(tmp_path, "abc", *_reversed(_made("adamw")), print)


def _reversed(made: tuple[Few, torch.optim.Optimizer]) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    return made[0].trained, made[1]


def test_sgd_is_nesterovs_in_float64() -> None:
    """Sutskever et al. 2013: v = 0.9 v + g, p = p - lr (g + 0.9 v), with g + 0.1 p for the matrix and the kernel."""
    few, optimizer = _made("sgd")
    wanted: dict[str, Tensor] = {name: p.detach().double().clone() for name, p in few.trained.items()}
    speed = {name: torch.zeros_like(value) for name, value in wanted.items()}
    for step in range(4):
        torch.manual_seed(100 + step)
        for name, parameter in few.trained.items():
            decay = 0.1 if parameter.ndim > 1 else 0.0
            gradient = torch.randn_like(parameter).double() + decay * wanted[name]
            speed[name] = 0.9 * speed[name] + gradient
            wanted[name] = wanted[name] - 1e-2 * (gradient + 0.9 * speed[name])
        _train(few, optimizer, range(step, step + 1))
    for name, parameter in few.trained.items():
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_another_optimiser_needs_a_rate_of_its_own(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe("train.optimizer=lion", "train.lr=null", teacher=None, losses="ce")
    with pytest.raises(RecipeError, match=r"train.lr: .*for lion; `remap lr` suggests"):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="take adamw or sgd with fsdp2"):
        tiny.recipe("train.optimizer=lion", "train.parallel=fsdp2")
