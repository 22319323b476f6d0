"""Swin transformers, version 1 and 2: attention in windows, stages of shrinking grids; and what prompts need of them.

Letters: B batch, M windows of an image, N tokens of a window, H heads, p prompts, C width of a stage.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, plain_class
from remap.backbones.families.base import Family, Undo, require_size
from remap.backbones.families.reading import (
    admit_into_bias,
    admitted_tokens,
    attention_block,
    exactly,
    pair,
    real,
    rest_of_stages,
)
from remap.backbones.typed import submodule


class Swin(Family[SwinTransformer]):
    """timm's ``SwinTransformer`` (version 1). A block takes (B, H, W, D); its norm2 and MLP see (B, H*W, D).

    Attributes:
        kinds: Classes of the model, its blocks and their attention.
    """

    name = "swin"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformer, SwinTransformerBlock, WindowAttention)

    def matches(self, model: nn.Module) -> bool:
        whole, *inside = self.kinds
        return exactly(model, whole) and all(
            [plain_class(part) for part in (block, block.attn, block.mlp)] == [*inside, Mlp]
            for stage in _stages(model)
            for block in stage.blocks
        )

    def read(self, model: SwinTransformer) -> Anatomy:
        blocks = tuple(
            attention_block(
                model, f"layers.{stage}.blocks.{index}", width=block.dim, grid=pair(block.input_resolution), stage=stage
            )
            for stage, layer in enumerate(_stages(model))
            for index, block in enumerate(layer.blocks)
        )
        last, embedding = blocks[-1], submodule(model, "patch_embed", PatchEmbed)
        downsamples = (f"layers.{stage}.downsample.norm" for stage in range(len(model.layers)))
        return Anatomy(
            family=self.name,
            width=model.head_hidden_size,
            depth=len(blocks),
            heads=last.heads,
            head_dim=last.head_dim,
            mlp_hidden=last.mlp_hidden,
            image_size=pair(embedding.img_size),
            patch_size=pair(embedding.patch_size),
            grid=last.grid,
            input_module="patch_embed",
            embedding_norms=real(model, ("patch_embed.norm", *downsamples)),
            final_norm=next(iter(real(model, ("norm",))), None),
            classifier_heads=("head.fc",),
            blocks=blocks,
        )

    def size_arguments(self, model: SwinTransformer, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        patch, windows = max(anatomy.patch_size), [max(pair(window)) for window in _windows(model)]

        def fits(size: int) -> bool:
            # Stages halve the grid, rounding up; a grid smaller than the window is one window.
            grids = [-(-(size // patch) // 2**stage) for stage in range(len(windows))]
            whole = all(grid <= window or grid % window == 0 for grid, window in zip(grids, windows, strict=True))
            return size % patch == 0 and whole

        shown = ", ".join(map(str, sorted(set(windows))))
        rule = f"its patches are {patch} wide and its windows {shown} patches, and only whole ones fit in each stage"
        require_size(model, image_size, fits, rule)
        return {"img_size": image_size}

    def rest_of_forward(self, model: SwinTransformer, index: int, x: Tensor) -> Tensor:
        return model.norm(rest_of_stages(_stages(model), index, x))


class SwinV2(Swin):
    """timm's ``SwinTransformerV2``: x + norm1(attn(x)), then x + norm2(mlp(x)).

    Its attention is softmax(s cos(q, k) + bias) with a learned scale a head and a bias that an MLP makes of positions,
    in windows as well.
    """

    name = "swinv2"
    kinds = (SwinTransformerV2, SwinTransformerV2Block, CosineAttention)

    def read(self, model: SwinTransformer) -> Anatomy:
        anatomy = super().read(model)
        return replace(anatomy, blocks=tuple(replace(b, norms_behind=True) for b in anatomy.attention_blocks))


def admit_window_tokens(model: nn.Module, anatomy: Anatomy, count: int, first: int) -> Undo:
    """Give windows of the blocks from ``first`` on room for ``count`` tokens in front, with a position bias of 0."""
    attentions = [submodule(model, block.attn, WindowAttention) for block in anatomy.attention_blocks[first:]]
    return admit_into_bias(attentions, "_get_rel_pos_bias", _roomy_bias, count)


def with_window_tokens(mask_MNN: Tensor | None, count: int) -> Tensor | None:
    """Put zeros for ``count`` tokens in front of the mask of shifted windows: they see all and are seen by all."""
    return None if mask_MNN is None else F.pad(mask_MNN, (count, 0, count, 0))


def merging_before(model: nn.Module, anatomy: Anatomy, index: int) -> PatchMerging | None:
    """Return the patch merging between block ``index`` and the one before it; None inside a stage."""
    stage = anatomy.blocks[index].stage
    if index == 0 or anatomy.blocks[index - 1].stage == stage:
        return None
    return submodule(model, f"layers.{stage}.downsample", PatchMerging)


def merge_prompts(merging: PatchMerging, prompts_BpC: Tensor) -> Tensor:
    """Merge each prompt with itself as four neighbouring patches are: (B, p, C) to (B, p, 2C)."""
    return merging.reduction(merging.norm(torch.cat([prompts_BpC] * 4, dim=-1)))


def _stages(model: Any) -> list[Any]:
    return list(model.layers)


def _windows(model: SwinTransformer) -> Sequence[int | tuple[int, int]]:
    """Return the window size of each stage, before those that are larger than the grid were made smaller."""
    sizes = model._ref_window_sizes
    assert not isinstance(sizes, int)
    return sizes


def _roomy_bias(attention: WindowAttention) -> Tensor:
    """Put zeros in front of (1, H, N, N): (1, H, p + N, p + N)."""
    room = admitted_tokens(attention)
    return F.pad(WindowAttention._get_rel_pos_bias(attention), (room, 0, room, 0))
