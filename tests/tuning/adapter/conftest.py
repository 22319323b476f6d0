"""Untouched timm models whose blocks are put together again from a formula."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from timm.models import beit, eva, swin_transformer, vision_transformer
from torch import Tensor, nn

BLOCKS = (beit.Block, eva.EvaBlock, swin_transformer.SwinTransformerBlock, vision_transformer.Block)

Branch = Callable[[Tensor], Tensor]


@pytest.fixture
def rewire() -> Callable[[nn.Module, Callable[..., Tensor]], nn.Module]:
    """A function that gives every block the forward ``formula(path, block, x, attn, mlp)``.

    ``attn`` and ``mlp`` are the block's branches from behind their norms on, LayerScale included.
    """

    def change(model: nn.Module, formula: Callable[..., Tensor]) -> nn.Module:
        for path, block in model.named_modules():
            if isinstance(block, BLOCKS):
                block.forward = partial(_forward, formula, path, block)
        return model

    return change


def _forward(formula: Callable[..., Tensor], path: str, block: Any, x: Tensor, **context: Any) -> Tensor:
    def attn(normed: Tensor) -> Tensor:
        if isinstance(block, swin_transformer.SwinTransformerBlock):
            return block._attn(normed)
        return block.attn(normed, **context) * _gamma(block, 1)

    def mlp(normed: Tensor) -> Tensor:
        return block.mlp(normed) * _gamma(block, 2)

    return formula(path, block, x, attn, mlp)


def _gamma(block: Any, number: int) -> Tensor | float:
    if hasattr(block, f"ls{number}"):
        return getattr(getattr(block, f"ls{number}"), "gamma", 1.0)
    gamma = getattr(block, f"gamma_{number}", None)
    return 1.0 if gamma is None else gamma
