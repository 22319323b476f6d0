"""Tiny models of every family and variant: timm's own names with their options, at a tiny size."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_models
from torch import nn

TINY = tiny_models("anatomy")


def build_tiny(name: str, seed: int = 0) -> nn.Module:
    """In eval mode, float64, with every parameter and running statistic away from 0 and 1."""
    size = 64 if name.startswith(("convnext", "resn")) else 32
    torch.manual_seed(seed)
    overlay = {"input_size": (3, size, size)}
    model = TINY[name].build(4, pretrained_cfg_overlay=overlay).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if "running" in key:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    return build_tiny


@pytest.fixture(params=TINY)
def tiny_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name, row in TINY.items() if "depth" in row.options])
def sequence_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name, row in TINY.items() if "num_heads" not in row.options])
def convolutional_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name, row in TINY.items() if "num_heads" in row.options])
def attention_name(request: pytest.FixtureRequest) -> str:
    return request.param
