"""Plain vision transformers: ViT, DeiT, DeiT-III, DINOv2, CLIP and SigLIP towers."""

from collections.abc import Callable
from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock, AttentionScores
from remap.backbones.families.base import (
    MLPS,
    Family,
    Undo,
    exactly,
    fused_qkv,
    linear,
    mlp_projections,
    pair,
    real,
    run_blocks,
    tensor_path,
    watch_values,
)


class PlainViT(Family):
    """timm's ``VisionTransformer`` with its standard block."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return (
            isinstance(model, VisionTransformer)
            and len(model.blocks) > 0
            and all(
                exactly(block, Block)
                and exactly(block.attn, Attention)
                and block.attn.gate is None
                and exactly(block.mlp, *MLPS)
                for block in model.blocks
            )
        )

    @classmethod
    def read(cls, model: nn.Module) -> Anatomy:
        distilled = hasattr(model, "dist_token")
        return sequence_anatomy(
            model,
            "vit",
            _read_block,
            # The ratio, because the hybrid stems have a patch size of 1 behind a strided network.
            patch_size=pair(model.patch_embed.feat_ratio(as_scalar=False)),
            class_token_pooled=class_token_pooled(model) and not distilled,
            classifier_heads=("head", "head_dist") if distilled else ("head",),
        )

    @classmethod
    def rest_of_forward(cls, model: nn.Module, anatomy: Anatomy, index: int, x: Tensor) -> Tensor:
        return model.norm(run_blocks(model.blocks[index:], x, model.grad_checkpointing))

    @classmethod
    def admit_tokens(cls, model: nn.Module, anatomy: Anatomy, count: int) -> Undo:
        # Plain attention takes a sequence of any length.
        return lambda: None

    @classmethod
    def watch_attention(
        cls,
        model: nn.Module,
        anatomy: Anatomy,
        index: int,
        keep: Callable[[AttentionScores], None],
        *,
        values: bool = False,
    ) -> list[RemovableHandle]:
        attention, this_pass = model.blocks[index].attn, {}

        def v_ready(v: Tensor) -> None:
            this_pass["v"] = v

        # The norms are called in every pass, as Identity where there are none, and the query's comes first.
        def q_ready(module: nn.Module, args: tuple, q: Tensor) -> None:
            this_pass["q"] = q

        def k_ready(module: nn.Module, args: tuple, k: Tensor) -> None:
            keep(AttentionScores(this_pass.pop("q") * attention.scale, k, v_BHTh=this_pass.pop("v", None)))

        return [
            *(watch_values(attention, v_ready) if values else ()),
            attention.q_norm.register_forward_hook(q_ready),
            attention.k_norm.register_forward_hook(k_ready),
        ]


def sequence_anatomy(
    model: nn.Module,
    family: str,
    read_block: Callable[[nn.Module, int, tuple[int, int]], AttentionBlock],
    **facts: Any,
) -> Anatomy:
    """What models of one sequence of tokens have in common.

    Args:
        read_block: From the model, a block's number and the grid to the block.
        facts: What a family has otherwise.
    """
    grid = pair(model.patch_embed.grid_size)
    blocks = tuple(read_block(model, index, grid) for index in range(len(model.blocks)))
    last = blocks[-1]
    final_norm = next(iter(real(model, ("norm", "fc_norm"))), None)
    shared = {
        "patch_size": pair(model.patch_embed.patch_size),
        "num_prefix_tokens": getattr(model, "num_prefix_tokens", None),
        "class_token_pooled": class_token_pooled(model),
        "classifier_heads": ("head",),
    }
    return Anatomy(
        family=family,
        width=model.embed_dim,
        depth=len(blocks),
        heads=last.heads,
        head_dim=last.head_dim,
        mlp_hidden=last.mlp_hidden,
        image_size=pair(model.patch_embed.img_size),
        grid=grid,
        has_class_token=model.cls_token is not None,
        input_module="patch_embed",
        block_input_norm=next(iter(real(model, ("norm_pre",))), None),
        embedding_norms=norms_outside_blocks(model, final_norm),
        final_norm=final_norm,
        blocks=blocks,
        **{**shared, **facts},
    )


def class_token_pooled(model: nn.Module) -> bool:
    """Whether the classifier reads the class token of the final norm's output and nothing else."""
    whole = getattr(model, "attn_pool", None) is None and isinstance(model.fc_norm, nn.Identity)
    return whole and model.global_pool == "token" and model.cls_token is not None


def norms_outside_blocks(model: nn.Module, final_norm: str | None) -> tuple[str, ...]:
    """Norms of a sequence model outside its blocks in the order of the forward, the final one excluded."""
    candidates = ("patch_embed.norm", "norm_pre", "norm", "attn_pool.norm", "fc_norm")
    return tuple(path for path in real(model, candidates) if path != final_norm)


def _read_block(model: nn.Module, index: int, grid: tuple[int, int]) -> AttentionBlock:
    block = f"blocks.{index}"
    attention = model.blocks[index].attn
    mlp = mlp_projections(model, f"{block}.mlp")
    norms = ("norm1", "attn.q_norm", "attn.k_norm", "attn.norm", "norm2", "mlp.norm")
    return AttentionBlock(
        block=block,
        width=model.embed_dim,
        grid=grid,
        stage=0,
        norms=real(model, (f"{block}.{norm}" for norm in norms)),
        projections={**fused_qkv(model, f"{block}.attn"), "o": linear(model, f"{block}.attn.proj"), **mlp},
        norm1=f"{block}.norm1",
        attn=f"{block}.attn",
        heads=attention.num_heads,
        head_dim=attention.head_dim,
        attn_branch_end=f"{block}.drop_path1",
        attn_scale=tensor_path(model, f"{block}.ls1.gamma"),
        norm2=f"{block}.norm2",
        mlp=f"{block}.mlp",
        mlp_hidden=mlp["fc1"].stop - mlp["fc1"].start,
        mlp_branch_end=f"{block}.drop_path2",
        mlp_scale=tensor_path(model, f"{block}.ls2.gamma"),
    )
