"""A backbone, the method attached to it and its preprocessing: what a run trains, saves, loads and predicts with."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, classifier_parameters, set_fused_attention
from remap.backbones.build import Backbone, Identity
from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.remapping.signals import Needs, Signals, Tap
from remap.tuning import METHODS
from remap.tuning.base import Attached, Method


@dataclass
class Network:
    """A model ready to be run on raw pixels.

    Attributes:
        classes: Class names its head was trained for; None while the head is not.
    """

    model: nn.Module
    anatomy: Anatomy
    preprocess: PreprocessSpec
    identity: Identity
    attached: Attached
    classes: tuple[str, ...] | None = None

    @property
    def head(self) -> dict[str, nn.Parameter]:
        return classifier_parameters(self.model, self.anatomy)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Everything a run trains and a task stores: the method's parameters and the head, by full name."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.attached.trainable} | self.head

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.trained.values())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def tap(self, needs: Needs = Needs()) -> Tap:
        return Tap(self.model, self.anatomy, needs, self.attached.extra_tokens)


def tuned(backbone: Backbone, method: str, options: dict[str, object]) -> Network:
    """Attach a method to a backbone and make its head trainable."""
    cls: type[Method] = METHODS.load(method)
    attached = cls(cls.Config(**options)).attach(backbone.model, backbone.anatomy)
    attached.forget_original()
    network = Network(backbone.model, backbone.anatomy, backbone.preprocess, backbone.identity, attached)
    for parameter in network.head.values():
        parameter.requires_grad_(True)
    return network


class Runner(nn.Module):
    """Raw pixels to signals: the network's own size, interpolation and normalisation, then the tapped forward.

    Args:
        bf16: Run the network under bfloat16 autocast; signals are compared in float32 all the same.
    """

    def __init__(self, network: Network, needs: Needs = Needs(), *, bf16: bool = False) -> None:
        super().__init__()
        self.model = network.model
        self.preprocess = Preprocess(network.preprocess).to(next(network.model.parameters()).device)
        self.tap = network.tap(needs)
        self.bf16 = bf16

    def forward(self, images_BCHW: Tensor) -> Signals:
        """uint8 (B, 3, V, V) to signals."""
        pixels = self.preprocess(images_BCHW)
        with torch.autocast(pixels.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            return self.tap(pixels)


def frozen(network: Network) -> Network:
    """Freeze a network for good: no gradients, eval mode, and ``train()`` has no effect on it."""
    network.model.requires_grad_(False)
    network.model.eval()
    network.model.train = lambda mode=True: network.model  # a teacher stays in eval whoever calls train()
    return network


def choose_attention(network: Network, setting: str, device: torch.device) -> None:
    """Fused attention or not: on the CPU the fused kernel's backward costs more than the explicit one saves."""
    set_fused_attention(network.model, network.anatomy, setting == "on" or (setting == "auto" and device.type != "cpu"))
