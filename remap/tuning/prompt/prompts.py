"""What visual prompts have in common: options, initial values, and the way from block to block.

Letters: B batch, p prompts, D width.
"""

import math
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Options
from remap.tuning.weights import weight_of

PATH = "remap_prompts"
# The output of a block carries its own prompts' outputs to the next block under this attribute.
CARRIED = "remap_prompt_outputs"


class PromptOptions(Options):
    """Options of both depths."""

    num_prompts: int = Field(default=10, ge=1, description="Prompts per block; added ones are one per token.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout probability on the prompts.")
    place: Literal["prepend", "add", "add_all", "pixel"] = Field(
        default="prepend",
        description="Prepend prompts, add them to the patches (add) or to the class token and registers too (add_all, "
        "the official code), or prepend patches learned as pixels.",
    )
    projection: int | None = Field(
        default=None, ge=1, description="Stored width, widened by a linear layer; null is full width."
    )
    init: Literal["random", "class_mean"] = Field(
        default="random", description="Random, or the mean pooled feature of each class, in turn."
    )

    @property
    def added(self) -> bool:
        """Whether prompts are added to tokens; else they are tokens of their own."""
        return self.place in ("add", "add_all")

    @model_validator(mode="after")
    def _fit_together(self) -> "PromptOptions":
        if self.projection is not None and self.place == "pixel":
            raise ValueError("prompts in pixels are not projected: leave projection out, or take place=prepend")
        if self.init == "class_mean" and (self.place != "prepend" or self.projection is not None):
            raise ValueError("class means are tokens of full width: they need place=prepend and no projection")
        return self


def weight_like(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """Return a weight of the first block, on whose device and in whose dtype prompts are made."""
    return weight_of(model, anatomy.blocks[0].projections["fc1"])


def patch_bound(anatomy: Anatomy, width: int) -> float:
    """Return Xavier's bound for the patch embedding: uniform prompts start out looking like patches (official code)."""
    height, across = anatomy.patch_size
    return math.sqrt(6.0 / (3 * height * across + width))


def carried(tokens: Tensor, index: int) -> Tensor:
    """Return the prompts' outputs that the input of block ``index`` carries; without any, raise a BackboneError."""
    prompts_BpD = getattr(tokens, CARRIED, None)
    if prompts_BpD is None:
        raise BackboneError(
            f"the input of block {index} is not the output of block {index - 1}, so its prompts are lost",
            given="a tensor made by something between the two blocks, such as reentrant gradient checkpointing",
            do="use non-reentrant checkpointing (timm's default), or vpt_deep, whose blocks own their prompts",
        )
    return prompts_BpD
