"""Typed access to models of timm and to their sub-modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class TimmModel(Protocol):
    """What ``timm.create_model`` promises of every model. B images, C classes, D features."""

    num_classes: int
    num_features: int
    pretrained_cfg: dict[str, Any]
    feature_info: list[dict[str, Any]]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the output of the last block, behind the final norm where there is one."""
        ...

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, C), or the classifier's input (B, D) with ``pre_logits``."""
        ...

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it out."""
        ...


def as_timm(model: nn.Module) -> TimmModel:
    """Return the same model, typed by timm's public interface."""
    return cast(TimmModel, model)


def standardises_weight(module: nn.Module) -> bool:
    """Whether a layer brings its weight's rows to mean 0 and variance 1: a scale folded into them would be lost."""
    return isinstance(module, StdConv2d | StdConv2dSame | ScaledStdConv2d | ScaledStdConv2dSame)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode while the block runs; then every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def inputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what modules are given while the block runs, in the order of their calls."""
    found: list[Tensor] = []
    handles = [one.register_forward_pre_hook(lambda _module, args: found.append(args[0])) for one in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def pooled_features(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return what enters the classifier, (B, D)."""
    return pool(model, as_timm(model).forward_features(images_BCHW))


def pool(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return what enters the classifier, (B, D), from what ``forward_features`` returned."""
    return as_timm(model).forward_head(tokens, pre_logits=True)


def input_channels(model: nn.Module) -> int:
    """Return how many channels a model's images have: those of its first convolution, if that takes the image itself.

    What timm's configuration says may be that of other weights; it is asked where the pixels are rearranged first.
    """
    from timm.layers import SpaceToDepth  # slow to import, and most who import this file do not need it

    config = as_timm(model).pretrained_cfg
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | SpaceToDepth)), None)
    if isinstance(first, nn.Conv2d) and config.get("first_conv", True):
        return first.in_channels
    return int(config.get("input_size", (3,))[0])


def submodule(model: nn.Module, path: str, kind: type[M]) -> M:
    """Return the sub-module at a dotted path, typed as the class that it is."""
    module = model.get_submodule(path)
    assert isinstance(module, kind), f"{path} is a {type(module).__name__}, not a {kind.__name__}"
    return module


def layer_at(model: nn.Module, path: str) -> nn.Linear | nn.Conv2d:
    """Return the linear layer or convolution at a dotted path of the anatomy."""
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear | nn.Conv2d), f"{path} is a {type(layer).__name__}"
    return layer
