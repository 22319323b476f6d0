"""Swin transformers: attention in windows, four stages of shrinking grids."""

from typing import Any

from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionBlock
from remap.backbones.families.base import (
    Family,
    exactly,
    fused_qkv,
    linear,
    mlp_projections,
    pair,
    real,
    require_size,
    run_blocks,
)


class Swin(Family):
    """timm's ``SwinTransformer`` (version 1). A block takes (B, H, W, D); its norm2 and MLP see (B, H*W, D)."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return exactly(model, SwinTransformer) and all(
            exactly(block, SwinTransformerBlock) and exactly(block.attn, WindowAttention) and exactly(block.mlp, Mlp)
            for stage in model.layers
            for block in stage.blocks
        )

    @classmethod
    def read(cls, model: nn.Module) -> Anatomy:
        blocks = tuple(
            _read_block(model, stage, index)
            for stage in range(len(model.layers))
            for index in range(len(model.layers[stage].blocks))
        )
        last = blocks[-1]
        downsamples = (f"layers.{stage}.downsample.norm" for stage in range(len(model.layers)))
        return Anatomy(
            family="swin",
            width=model.head_hidden_size,
            depth=len(blocks),
            heads=last.heads,
            head_dim=last.head_dim,
            mlp_hidden=last.mlp_hidden,
            image_size=pair(model.patch_embed.img_size),
            patch_size=pair(model.patch_embed.patch_size),
            grid=last.grid,
            num_prefix_tokens=0,
            has_class_token=False,
            class_token_pooled=False,
            input_module="patch_embed",
            block_input_norm=None,
            embedding_norms=real(model, ("patch_embed.norm", *downsamples)),
            final_norm=next(iter(real(model, ("norm",))), None),
            classifier_heads=("head.fc",),
            blocks=blocks,
        )

    @classmethod
    def size_arguments(cls, model: nn.Module, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        patch, windows = max(anatomy.patch_size), [max(pair(window)) for window in model._ref_window_sizes]

        def fits(size: int) -> bool:
            # Stages halve the grid, rounding up; a grid smaller than the window is one window.
            grids = [-(-(size // patch) // 2**stage) for stage in range(len(windows))]
            whole = all(grid <= window or grid % window == 0 for grid, window in zip(grids, windows, strict=True))
            return size % patch == 0 and whole

        shown = ", ".join(map(str, sorted(set(windows))))
        rule = f"its patches are {patch} wide and its windows {shown} patches, and only whole ones fit in each stage"
        require_size(model, image_size, fits, rule)
        return {"img_size": image_size}

    @classmethod
    def rest_of_forward(cls, model: nn.Module, anatomy: Anatomy, index: int, x: Tensor) -> Tensor:
        return model.norm(rest_of_stages(model.layers, index, x))


def rest_of_stages(stages: nn.Module, index: int, x: Tensor) -> Tensor:
    """From the input of block ``index``, counted over all stages, to the output of the last stage.

    A stage is entered with its downsampling done: its first block takes what ``downsample`` gave.
    """
    entered = False
    for stage in stages:
        if entered:
            x = stage(x)
        elif index < len(stage.blocks):
            x = run_blocks(stage.blocks[index:], x, stage.grad_checkpointing)
            entered = True
        else:
            index -= len(stage.blocks)
    return x


def _read_block(model: nn.Module, stage: int, index: int) -> AttentionBlock:
    block = f"layers.{stage}.blocks.{index}"
    module = model.get_submodule(block)
    projections = fused_qkv(model, f"{block}.attn")
    mlp = mlp_projections(model, f"{block}.mlp")
    q = projections["q"]
    return AttentionBlock(
        block=block,
        width=module.dim,
        grid=pair(module.input_resolution),
        stage=stage,
        norms=real(model, (f"{block}.{norm}" for norm in ("norm1", "norm2", "mlp.norm"))),
        projections={**projections, "o": linear(model, f"{block}.attn.proj"), **mlp},
        norm1=f"{block}.norm1",
        attn=f"{block}.attn",
        heads=module.attn.num_heads,
        head_dim=(q.stop - q.start) // module.attn.num_heads,
        attn_branch_end=f"{block}.drop_path1",
        norm2=f"{block}.norm2",
        mlp=f"{block}.mlp",
        mlp_hidden=mlp["fc1"].stop - mlp["fc1"].start,
        mlp_branch_end=f"{block}.drop_path2",
    )
