"""What prompts need of Swin: windows that take more tokens, and the way from stage to stage.

Letters: B batch, M windows of an image, N tokens of a window, H heads, p prompts, C width of a stage.
"""

from types import MethodType

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.families.base import Undo


def admit_window_tokens(model: nn.Module, anatomy: Anatomy, count: int, first: int) -> Undo:
    """Give the relative position biases of the blocks from ``first`` on zeros for ``count`` tokens in front of each
    window.

    The attention module gets a method of its own in place of its class's; ``copy.deepcopy`` binds the copy's to the
    copy. Calls add up, and each undo takes back its own.
    """
    attentions = [module_at(model, block.attn) for block in anatomy.blocks[first:]]
    _admit(attentions, count)

    def undo() -> None:
        _admit(attentions, -count)

    return undo


def with_window_tokens(mask_MNN: Tensor | None, count: int) -> Tensor | None:
    """The mask of shifted windows with zeros for ``count`` tokens in front: what comes in front sees all, and is seen
    by all."""
    return None if mask_MNN is None else F.pad(mask_MNN, (count, 0, count, 0))


def merging_before(model: nn.Module, anatomy: Anatomy, index: int) -> nn.Module | None:
    """The patch merging between block ``index`` and the one before it; None inside a stage."""
    stage = anatomy.blocks[index].stage
    if index == 0 or anatomy.blocks[index - 1].stage == stage:
        return None
    return model.layers[stage].downsample


def merge_prompts(merging: nn.Module, prompts_BpC: Tensor) -> Tensor:
    """(B, p, C) to (B, p, 2C): each prompt is merged with itself as four neighbouring patches are."""
    return merging.reduction(merging.norm(torch.cat([prompts_BpC] * 4, dim=-1)))


def _admit(attentions: list[nn.Module], count: int) -> None:
    for attention in attentions:
        room = getattr(attention, "admitted_tokens", 0) + count
        if room:
            attention.admitted_tokens = room
            attention._get_rel_pos_bias = MethodType(_roomy_bias, attention)
        else:
            del attention.admitted_tokens
            del attention._get_rel_pos_bias


def _roomy_bias(attention: WindowAttention) -> Tensor:
    """(1, H, N, N) with zeros in front: (1, H, p + N, p + N)."""
    room = attention.admitted_tokens
    return F.pad(WindowAttention._get_rel_pos_bias(attention), (room, 0, room, 0))
