"""Tiny pairs of sequence models for weight remapping: timm's own names with their options, in float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_models
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.remapping.weights import INITS
from remap.remapping.weights.base import Report, remap_weights

VARIANTS = tiny_models("weights")
SEQUENCES = [name for name in VARIANTS if name not in ("swin", "resnet")]

Build = Callable[..., SimpleNamespace]


def build_model(variant: str, seed: int = 0, **changes: Any) -> SimpleNamespace:
    """A model with its anatomy, in eval mode, every parameter away from 0 and 1."""
    torch.manual_seed(seed)
    model = VARIANTS[variant].build(4, **changes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SimpleNamespace(model=model, anatomy=anatomy_of(model))


def run_init(
    name: str, teacher: SimpleNamespace, student: SimpleNamespace, sample: Any = None, **options: Any
) -> Report:
    cls = INITS.load(name)
    return remap_weights(cls(cls.Config(**options)), teacher, student, sample)


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


@pytest.fixture
def build() -> Build:
    return build_model


@pytest.fixture
def initialise() -> Callable[..., Report]:
    return run_init


@pytest.fixture
def features() -> Callable[[nn.Module, Tensor], Tensor]:
    """What enters the classifier."""
    return pooled


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SEQUENCES)
def sequence(request: pytest.FixtureRequest) -> str:
    return request.param
