"""Tiny teachers made by timm, with every parameter away from its initial 0 or 1. Random, offline, on the CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_models import tiny_models
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import Backbone, Identity
from remap.backbones.preprocess import PreprocessSpec

TEACHERS = tiny_models("cut")


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """A function from a teacher's name to a model, in eval."""

    def made(name: str, **options: object) -> nn.Module:
        torch.manual_seed(0)
        model = TEACHERS[name].build(**{"num_classes": 5, **options})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return made


@pytest.fixture
def as_teacher() -> Callable[[nn.Module], Backbone]:
    def wrapped(model: nn.Module) -> Backbone:
        return Backbone(model, anatomy_of(model), PreprocessSpec.of(model), Identity("tiny", "none", ""), True)

    return wrapped


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def batches(images: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(images.split(4))
