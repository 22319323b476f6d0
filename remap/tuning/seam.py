"""The seam of a tuned network: where its frozen beginning ends, so that it can be run once for each image.

Letters: B batch, T tokens, D width, C classes.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at, rest_of_forward


class _TimmModel(Protocol):
    def forward_features(self, images_BCHW: Tensor) -> Tensor: ...

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor: ...


def features_of(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return what a timm model's ``forward_features`` makes of normalised images."""
    return cast(_TimmModel, model).forward_features(images_BCHW)


def logits_of(model: nn.Module, features: Tensor, *, pre_logits: bool = False) -> Tensor:
    """Return what a timm model's ``forward_head`` makes of features; ``pre_logits`` stops before the classifier."""
    return cast(_TimmModel, model).forward_head(features, pre_logits=pre_logits)


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
    """The complete backbone is frozen: cached are the inputs of the classifier's linear layers, before any hook."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy, self.first_block = model, anatomy, anatomy.depth

    @torch.no_grad()
    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        heads = {path: module_at(self.model, path) for path in self.anatomy.classifier_heads}
        # The first of two heads is called before the second one's input is known: what a method hooked there must not
        # run, least of all change its running statistics.
        hooks = [(head, head._forward_pre_hooks, head._forward_hooks) for head in heads.values()]
        for path, head in heads.items():

            def keep(_module: nn.Module, args: tuple, path: str = path) -> None:
                kept[path] = args[0]
                if len(kept) == len(heads):
                    raise _Reached

            head._forward_pre_hooks, head._forward_hooks = OrderedDict(), OrderedDict()
            head.register_forward_pre_hook(keep)
        try:
            logits_of(self.model, features_of(self.model, images_BCHW))
        except _Reached:
            return kept
        finally:
            for head, before, after in hooks:
                head._forward_pre_hooks, head._forward_hooks = before, after
        raise AssertionError("the classifier was not reached")

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

    @torch.no_grad()
    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple) -> None:
            kept.append(args[0])
            raise _Reached

        block = module_at(self.model, self.anatomy.blocks[self.first_block].block)
        handle = block.register_forward_pre_hook(keep, prepend=True)
        try:
            features_of(self.model, images_BCHW)
        except _Reached:
            return {"input": kept[0]}
        finally:
            handle.remove()
        raise AssertionError("the block was not reached")

    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        tokens = rest_of_forward(self.model, self.anatomy, self.first_block, kept["input"])
        return logits_of(self.model, tokens)


class _Reached(Exception):
    """Ends a forward pass where the stem ends."""
