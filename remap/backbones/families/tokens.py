"""Room for more tokens in the last blocks of a sequence model only."""

from types import SimpleNamespace

from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families import FAMILIES
from remap.backbones.families.base import Undo
from remap.errors import BackboneError


def admit_tokens_from(model: nn.Module, anatomy: Anatomy, count: int, first: int) -> Undo:
    """``admit_tokens`` for the blocks from ``first`` on; those before it keep their sequence.

    Raises:
        BackboneError: All blocks share one relative position bias, so that none can have room alone.
    """
    if first == 0:
        return FAMILIES.load(anatomy.family).admit_tokens(model, anatomy, count)
    if getattr(model, "rel_pos_bias", None) is not None:
        raise BackboneError(
            "this backbone's blocks share one relative position bias, so tokens enter all of them or none",
            given=f"more tokens from block {first} on",
            do="let them enter at the first block",
        )
    rest = SimpleNamespace(blocks=model.blocks[first:], rel_pos_bias=None)
    return FAMILIES.load(anatomy.family).admit_tokens(rest, anatomy, count)
