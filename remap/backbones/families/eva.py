"""Transformers of timm's Eva class, most of them rotary: EVA, EVA-02, DINOv3, Perception Encoder."""

from collections.abc import Callable

from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import checkpoint
from timm.models.eva import Eva as TimmEva
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, cat, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock, AttentionScores, Projection
from remap.backbones.families.base import (
    MLPS,
    Family,
    Undo,
    exactly,
    fused_qkv,
    linear,
    mlp_projections,
    real,
    tensor_path,
    watch_values,
)
from remap.backbones.families.vit import sequence_anatomy
from remap.errors import BackboneError


class Eva(Family):
    """timm's ``Eva`` with its pre-norm block, as many key heads as query heads and no gate."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return (
            isinstance(model, TimmEva)
            and len(model.blocks) > 0
            and all(exactly(block, EvaBlock) and _regular(block) for block in model.blocks)
        )

    @classmethod
    def read(cls, model: nn.Module) -> Anatomy:
        return sequence_anatomy(model, "eva", _read_block)

    @classmethod
    def rest_of_forward(cls, model: nn.Module, anatomy: Anatomy, index: int, x: Tensor) -> Tensor:
        rope = _rope(model)
        # A mixed embedding has one row of angles a block.
        mixed = rope is not None and model.rope_mixed
        for number, block in enumerate(model.blocks[index:], start=index):
            angles = rope[number] if mixed else rope
            x = checkpoint(block, x, rope=angles) if model.grad_checkpointing else block(x, rope=angles)
        return model.norm(x)

    @classmethod
    def admit_tokens(cls, model: nn.Module, anatomy: Anatomy, count: int) -> Undo:
        # Tokens of the prefix keep their queries and keys unrotated.
        for block in model.blocks:
            block.attn.num_prefix_tokens += count

        def undo() -> None:
            for block in model.blocks:
                block.attn.num_prefix_tokens -= count

        return undo

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

        def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
            this_pass["rope"] = args[1] if len(args) > 1 else kwargs.get("rope")

        def v_ready(v: Tensor) -> None:
            this_pass["v"] = v

        # The norms are called in every pass, as Identity where there are none, and the query's comes first.
        def q_ready(module: nn.Module, args: tuple, q: Tensor) -> None:
            this_pass["q"] = q

        def k_ready(module: nn.Module, args: tuple, k: Tensor) -> None:
            rope, q = this_pass.pop("rope"), this_pass.pop("q")
            q, k = rotated(attention, q, rope) * attention.scale, rotated(attention, k, rope)
            keep(AttentionScores(q, k, v_BHTh=this_pass.pop("v", None)))

        return [
            *(watch_values(attention, v_ready) if values else ()),
            attention.register_forward_pre_hook(begins, with_kwargs=True),
            attention.q_norm.register_forward_hook(q_ready),
            attention.k_norm.register_forward_hook(k_ready),
        ]


def _regular(block: nn.Module) -> bool:
    attention = block.attn
    return (
        exactly(attention, EvaAttention, AttentionRope)
        and attention.gate is None
        and getattr(attention, "num_kv_groups", 1) == 1
        and exactly(block.mlp, *MLPS)
    )


def _rope(model: nn.Module) -> Tensor | None:
    """The rotary embedding of the model's own grid, as its forward makes it."""
    if model.rope is None:
        return None
    if model.training and model.patch_drop is not None:
        raise BackboneError(
            "the rest of a rotary model's forward cannot be run with patch dropout",
            given="which patches were dropped is not known any more",
            do="build the model without patch_drop_rate",
        )
    if not model.dynamic_img_size and hasattr(model.rope, "feat_shape"):
        return model.rope.get_embed()
    return model.rope.get_embed(shape=model.patch_embed.grid_size)


def rotated(attention: nn.Module, x_BHTh: Tensor, rope: Tensor | None) -> Tensor:
    """Queries or keys with their rotation, which leaves the prefix out."""
    if rope is None:
        return x_BHTh
    prefix = attention.num_prefix_tokens
    turned = apply_rot_embed_cat(x_BHTh[:, :, prefix:], rope, half=attention.rotate_half)
    return cat([x_BHTh[:, :, :prefix], turned], dim=2).type_as(x_BHTh)


def _attention_projections(model: nn.Module, attn: str) -> dict[str, Projection]:
    if model.get_submodule(attn).qkv is not None:
        return fused_qkv(model, attn)
    return {word: linear(model, f"{attn}.{word}_proj") for word in "qkv"}


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
        projections={
            **_attention_projections(model, f"{block}.attn"),
            "o": linear(model, f"{block}.attn.proj"),
            **mlp,
        },
        norm1=f"{block}.norm1",
        attn=f"{block}.attn",
        heads=attention.num_heads,
        head_dim=attention.head_dim,
        attn_branch_end=f"{block}.drop_path1",
        attn_scale=tensor_path(model, f"{block}.gamma_1"),
        norm2=f"{block}.norm2",
        mlp=f"{block}.mlp",
        mlp_hidden=mlp["fc1"].stop - mlp["fc1"].start,
        mlp_branch_end=f"{block}.drop_path2",
        mlp_scale=tensor_path(model, f"{block}.gamma_2"),
    )
