"""The seam of a tuned network: where its frozen beginning ends, so that it can be run once for each image.

Letters: B batch, T tokens, D width, C classes.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at, rest_of_forward
from remap.backbones.typed import as_timm


class Seam(ABC):
    """Splits ``model(images)`` into a stem that nothing trained changes, and the rest.

    ``rest(stem(images), images)`` gives the logits of ``model(images)`` up to rounding.

    Attributes:
        first_block: Blocks from this one on are part of the rest; attention can be read there only.
        reads_images: Whether the rest needs the images besides what the stem gave.
    """

    first_block: int
    reads_images: bool = False

    @abstractmethod
    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return what is cached of normalised images, one row an image, without a graph."""

    @abstractmethod
    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        """Return logits (B, C) from the stem's result.

        Args:
            images_BCHW: Normalised images where ``reads_images``.
            whole_blocks: Whether every token of the blocks of the rest is needed (attention is read there).
        """


class FeatureSeam(Seam):
    """The complete backbone is frozen: cached are the inputs of the classifier's linear layers, before any hook.

    Attributes:
        plain: Whether they are those of the backbone without the method, so that tasks of other methods share them.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, plain: bool = True) -> None:
        self.model, self.anatomy, self.first_block, self.plain = model, anatomy, anatomy.depth, plain

    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        return _inputs_of(self.model, self.anatomy.classifier_heads, images_BCHW)

    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        # timm's distilled models average their two classifiers outside distilled training.
        logits = [module_at(self.model, path)(kept[path]).flatten(1) for path in self.anatomy.classifier_heads]
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]


def feature_seam(model: nn.Module, anatomy: Anatomy) -> FeatureSeam | None:
    """Return the seam in front of the classifiers; None where the logits are more than their mean."""
    return FeatureSeam(model, anatomy) if anatomy.averaged_heads else None


class BlockSeam(Seam):
    """Blocks from ``first_block`` on are tuned: cached is the input of that block."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, first_block: int) -> None:
        self.model, self.anatomy, self.first_block = model, anatomy, first_block

    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        (tokens,) = _inputs_of(self.model, [self.anatomy.blocks[self.first_block].block], images_BCHW).values()
        return {"input": tokens}

    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        tokens = rest_of_forward(self.model, self.anatomy, self.first_block, kept["input"])
        return as_timm(self.model).forward_head(tokens)


@torch.no_grad()
def _inputs_of(model: nn.Module, paths: Sequence[str], images_BCHW: Tensor) -> dict[str, Tensor]:
    """Run a model up to the last of some modules; return what each is given, by path, before any hook."""
    found: dict[str, Tensor] = {}
    modules = {path: module_at(model, path) for path in paths}
    # The first of two classifiers is called before the second one's input is known: what a method hooked there must not
    # run, least of all change its running statistics.
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules.values()]
    for path, module in modules.items():

        def keep(_module: nn.Module, args: tuple, path: str = path) -> None:
            found[path] = args[0]
            if len(found) == len(modules):
                raise _Reached

        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        module.register_forward_pre_hook(keep)
    try:
        as_timm(model).forward_head(as_timm(model).forward_features(images_BCHW))
    except _Reached:
        return found
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after
    raise AssertionError(f"{', '.join(paths)} was not reached")


class _Reached(Exception):
    """Ends a forward pass where the stem ends."""
