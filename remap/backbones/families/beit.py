"""BEiT and BEiT v2: vision transformers whose attention has a relative position bias."""

from collections.abc import Callable
from types import MethodType

from timm.models import checkpoint
from timm.models.beit import Attention, Block, RelativePositionBias
from timm.models.beit import Beit as TimmBeit
from torch import Tensor, cat, nn
from torch.nn import functional as F
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
    real,
    tensor_path,
    watch_values,
)
from remap.backbones.families.vit import sequence_anatomy

PREFIX = 1  # the class token


class Beit(Family):
    """timm's ``Beit``."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return (
            exactly(model, TimmBeit)
            and len(model.blocks) > 0
            and all(
                exactly(block, Block) and exactly(block.attn, Attention) and exactly(block.mlp, *MLPS)
                for block in model.blocks
            )
        )

    @classmethod
    def read(cls, model: nn.Module) -> Anatomy:
        return sequence_anatomy(model, "beit", _read_block, num_prefix_tokens=PREFIX)

    @classmethod
    def rest_of_forward(cls, model: nn.Module, anatomy: Anatomy, index: int, x: Tensor) -> Tensor:
        shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        for block in model.blocks[index:]:
            if model.grad_checkpointing:
                x = checkpoint(block, x, shared_rel_pos_bias=shared)
            else:
                x = block(x, shared_rel_pos_bias=shared)
        return model.norm(x)

    @classmethod
    def admit_tokens(cls, model: nn.Module, anatomy: Anatomy, count: int) -> Undo:
        sources = [_BiasSource(block.attn, "_get_rel_pos_bias", _block_bias) for block in model.blocks if _own(block)]
        if model.rel_pos_bias is not None:
            sources.append(_BiasSource(model.rel_pos_bias, "forward", _shared_bias))
        for source in sources:
            source.admit(count)

        def undo() -> None:
            for source in sources:
                source.admit(-count)

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

        def v_ready(v: Tensor) -> None:
            this_pass["v"] = v

        def scores(qk_BTE: Tensor) -> None:
            batch, tokens, _ = qk_BTE.shape
            q, k = qk_BTE.reshape(batch, tokens, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            bias = this_pass.pop("shared")
            if attention.relative_position_bias_table is not None:
                own = attention._get_rel_pos_bias()
                bias = own if bias is None else own + bias
            keep(AttentionScores(q * attention.scale, k, bias, this_pass.pop("v", None)))

        def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
            this_pass["shared"] = args[1] if len(args) > 1 else kwargs.get("shared_rel_pos_bias")
            if attention.q_bias is not None and not attention.qkv_bias_separate:
                # The qkv layer is never called: only its weight is read.
                rows = 2 * attention.q_bias.numel()
                bias = cat([attention.q_bias, attention.k_bias])
                scores(F.linear(args[0], attention.qkv.weight[:rows], bias))

        def qkv_ready(module: nn.Module, args: tuple, qkv_BTE: Tensor) -> None:
            qk = qkv_BTE[..., : 2 * qkv_BTE.shape[-1] // 3]
            # timm adds separate biases in place, behind this hook; the sum must not see them twice.
            scores(qk if attention.q_bias is None else qk + cat([attention.q_bias, attention.k_bias]))

        return [
            *(watch_values(attention, v_ready) if values else ()),  # they are there before the scores
            attention.register_forward_pre_hook(begins, with_kwargs=True),
            attention.qkv.register_forward_hook(qkv_ready),
        ]


class _BiasSource:
    """A module of timm with a method that makes a relative position bias, which gets room for more tokens.

    The module is given a method of its own in place of its class's. ``copy.deepcopy`` binds the copy's method to the
    copy, and neither parameters nor module names change.
    """

    def __init__(self, module: nn.Module, method: str, roomy: Callable[[nn.Module], Tensor]) -> None:
        self.module, self.method, self.roomy = module, method, roomy

    def admit(self, count: int) -> None:
        room = getattr(self.module, "admitted_tokens", 0) + count
        if room:
            self.module.admitted_tokens = room
            setattr(self.module, self.method, MethodType(self.roomy, self.module))
        else:
            del self.module.admitted_tokens
            delattr(self.module, self.method)


def _block_bias(attention: Attention) -> Tensor:
    """(1, H, T, T)"""
    return _with_room(Attention._get_rel_pos_bias(attention), attention.admitted_tokens)


def _shared_bias(source: RelativePositionBias) -> Tensor:
    """(H, T, T)"""
    return _with_room(RelativePositionBias.forward(source), source.admitted_tokens)


def _with_room(bias: Tensor, count: int) -> Tensor:
    """Rows and columns of zeros behind the class token: (..., T, T) -> (..., T + count, T + count)."""
    rows = bias.new_zeros(*bias.shape[:-2], count, bias.shape[-1])
    bias = cat([bias[..., :PREFIX, :], rows, bias[..., PREFIX:, :]], dim=-2)
    columns = bias.new_zeros(*bias.shape[:-1], count)
    return cat([bias[..., :PREFIX], columns, bias[..., PREFIX:]], dim=-1)


def _own(block: nn.Module) -> bool:
    return block.attn.relative_position_bias_table is not None


def _read_block(model: nn.Module, index: int, grid: tuple[int, int]) -> AttentionBlock:
    block = f"blocks.{index}"
    attention = model.blocks[index].attn
    projections = fused_qkv(model, f"{block}.attn")
    mlp = mlp_projections(model, f"{block}.mlp")
    q = projections["q"]
    return AttentionBlock(
        block=block,
        width=model.embed_dim,
        grid=grid,
        stage=0,
        norms=real(model, (f"{block}.{norm}" for norm in ("norm1", "norm2", "mlp.norm"))),
        projections={**projections, "o": linear(model, f"{block}.attn.proj"), **mlp},
        norm1=f"{block}.norm1",
        attn=f"{block}.attn",
        heads=attention.num_heads,
        head_dim=(q.stop - q.start) // attention.num_heads,
        attn_branch_end=f"{block}.drop_path1",
        attn_scale=tensor_path(model, f"{block}.gamma_1"),
        norm2=f"{block}.norm2",
        mlp=f"{block}.mlp",
        mlp_hidden=mlp["fc1"].stop - mlp["fc1"].start,
        mlp_branch_end=f"{block}.drop_path2",
        mlp_scale=tensor_path(model, f"{block}.gamma_2"),
    )
