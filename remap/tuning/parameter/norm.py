"""Norm tuning (Zhao et al. 2023, arXiv 2312.11420): train the affine part of the norms."""

from typing import Literal

from pydantic import Field
from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families import FAMILIES
from remap.backbones.families.reading import norm_paths
from remap.errors import BackboneError
from remap.tuning.base import IN_PLACE, Attachment, Method, Options, names_where


class Norm(Method):
    """Train weight and bias of every norm: layer, RMS, group, batch and response norms; 38,400 on ViT-B/16.

    The norms of queries, keys, attention outputs and hidden units count too, where a backbone has them. The running
    statistics of batch norms stay as they are, in training as well.
    """

    class Config(Options):
        where: Literal["all", "blocks"] = Field(default="all", description="All norms, or those inside blocks only.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        names = norm_parameters(model, anatomy)
        if self.config.where == "blocks":
            blocks = tuple(f"{block.block}." for block in anatomy.blocks)
            names = [name for name in names if name.startswith(blocks)]
        if not names:
            raise BackboneError(
                "this backbone has no norms with a weight or bias there",
                given=f"{type(model).__name__}, where: {self.config.where}",
                do="take bitfit, which trains its biases, or ssf, which scales the output of its layers",
            )
        return Attachment(trainable=names, no_decay=names, fold=IN_PLACE)


def norm_parameters(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Return the names of the weights and biases of all norms that can learn."""
    norms = norm_paths(model)
    return names_where(
        model, anatomy, lambda name: name.rpartition(".")[0] in norms and not never_learns(name, anatomy)
    )


def never_learns(name: str, anatomy: Anatomy) -> bool:
    """Return whether the gradient is 0 by nature.

    A shift common to all keys adds the same to all scores of a query, which
    the softmax over keys does not see. A rotary model turns every key by another angle, and the shift with it.
    """
    return name.endswith(".k_norm.bias") and not FAMILIES.row(anatomy.family).rotary
