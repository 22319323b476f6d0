"""The independent source of the methods that change weights: an untouched timm model whose weights a test changes."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Weights = dict[str, Tensor]


@pytest.fixture
def shaken(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> Callable[..., tuple[Attached, Weights, Tensor]]:
    """A function that attaches a method in float64 and moves its parameters: (attached, its state, logits)."""

    def make(method: str, variant: str, **options: object) -> tuple[Attached, Weights, Tensor]:
        model = build(variant)
        # PSOFT decomposes weights of at most 32 bits.
        attached = attach(method, model if method == "psoft" else model.double(), **options)
        model.double()
        tools.shake(attached)
        return attached, attached.state(), attached.model(tools.images().double()).detach()

    return make


@pytest.fixture
def plain_logits(build: Callable[..., nn.Module], tools: SimpleNamespace) -> Callable[..., Tensor]:
    """A function that gives the logits of the untouched model, after ``change`` has edited its weights in place."""

    def run(variant: str, change: Callable[[Weights], None] = lambda weights: None) -> Tensor:
        model = build(variant).double()
        with torch.no_grad():
            change(dict(model.named_parameters()))
            return model(tools.images().double())

    return run


@pytest.fixture
def count() -> Callable[..., int]:
    """A function that counts what a method trains on ViT-B/16 without a head; shapes only, so no memory."""

    def trained(method: str, **options: object) -> int:
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
        attached = attach_method(model, anatomy_of(model), method, options)
        parameters = dict(model.named_parameters())
        return sum(parameters[name].numel() for name in attached.trainable)

    return trained
