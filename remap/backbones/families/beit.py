"""BEiT and BEiT v2: vision transformers whose attention has a relative position bias."""

from typing import Any

from timm.models import checkpoint
from timm.models.beit import Attention, Block, RelativePositionBias
from timm.models.beit import Beit as TimmBeit
from torch import Tensor, cat, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock, AttentionScores
from remap.backbones.families.base import KeepScores, Undo
from remap.backbones.families.reading import MLPS, admit_into_bias, admitted_tokens, attention_block, exactly
from remap.backbones.families.sequence import SequenceFamily, attention_of, sequence_anatomy, watch_values
from remap.errors import BackboneError

PREFIX = 1  # the class token


class Beit(SequenceFamily[TimmBeit]):
    """timm's ``Beit``."""

    name = "beit"

    def matches(self, model: nn.Module) -> bool:
        return (
            exactly(model, TimmBeit)
            and len(model.blocks) > 0
            and all(
                exactly(block, Block) and exactly(block.attn, Attention) and exactly(block.mlp, *MLPS)
                for block in model.blocks
            )
        )

    def read(self, model: TimmBeit) -> Anatomy:
        def read_block(path: str, grid: tuple[int, int]) -> AttentionBlock:
            return attention_block(model, path, width=model.embed_dim, grid=grid)

        return sequence_anatomy(model, self.name, read_block, num_prefix_tokens=PREFIX)

    def rest_of_forward(self, model: TimmBeit, index: int, x: Tensor) -> Tensor:
        shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        for block in model.blocks[index:]:
            if model.grad_checkpointing:
                x = checkpoint(block, x, shared_rel_pos_bias=shared)
            else:
                x = block(x, shared_rel_pos_bias=shared)
        return model.norm(x)

    def admit_tokens(self, model: TimmBeit, count: int, first: int = 0) -> Undo:
        shared = model.rel_pos_bias
        if first and shared is not None:
            raise BackboneError(
                "this backbone's blocks share one relative position bias, so tokens enter all of them or none",
                given=f"more tokens from block {first} on",
                do="let them enter at the first block",
            )
        attentions = [attention_of(model, index, Attention) for index in range(first, len(model.blocks))]
        own = [attention for attention in attentions if attention.relative_position_bias_table is not None]
        undo = admit_into_bias(own, "_get_rel_pos_bias", _block_bias, count)
        undo_shared = admit_into_bias([] if shared is None else [shared], "forward", _shared_bias, count)

        def undo_both() -> None:
            undo()
            undo_shared()

        return undo_both

    def watch_attention(
        self, model: TimmBeit, index: int, keep: KeepScores, *, values: bool = False
    ) -> list[RemovableHandle]:
        attention, this_pass = attention_of(model, index, Attention), dict[str, Any]()

        def qk_bias() -> Tensor:
            assert attention.q_bias is not None and attention.k_bias is not None  # all three or none
            return cat([attention.q_bias, attention.k_bias])

        def v_ready(v: Tensor) -> None:
            this_pass["v"] = v

        def scores(qk_BTE: Tensor) -> None:
            batch, tokens, _ = qk_BTE.shape
            q, k = qk_BTE.reshape(batch, tokens, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            bias = position_bias(attention, this_pass.pop("shared"))
            keep(AttentionScores(q * attention.scale, k, bias, this_pass.pop("v", None)))

        def begins(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            this_pass["shared"] = args[1] if len(args) > 1 else kwargs.get("shared_rel_pos_bias")
            if attention.q_bias is not None and not attention.qkv_bias_separate:
                # The qkv layer is never called: only its weight is read.
                rows = 2 * attention.q_bias.numel()
                scores(F.linear(args[0], attention.qkv.weight[:rows], qk_bias()))

        def qkv_ready(_module: nn.Module, _args: tuple, qkv_BTE: Tensor) -> None:
            qk = qkv_BTE[..., : 2 * qkv_BTE.shape[-1] // 3]
            # timm adds separate biases in place, behind this hook; the sum must not see them twice.
            scores(qk if attention.q_bias is None else qk + qk_bias())

        return [
            *(watch_values(attention, v_ready) if values else ()),  # they are there before the scores
            attention.register_forward_pre_hook(begins, with_kwargs=True),
            attention.qkv.register_forward_hook(qkv_ready),
        ]


def position_bias(attention: Attention, shared: Tensor | None) -> Tensor | None:
    """Return the bias of a block, (H, T, T) or (1, H, T, T): its own, the one all blocks share, or their sum."""
    if attention.relative_position_bias_table is None:
        return shared
    own = attention._get_rel_pos_bias()
    return own if shared is None else own + shared


def _block_bias(attention: Attention) -> Tensor:
    """Return the bias of one block, (1, H, T, T)."""
    return _with_room(Attention._get_rel_pos_bias(attention), admitted_tokens(attention))


def _shared_bias(source: RelativePositionBias) -> Tensor:
    """Return the bias that all blocks share, (H, T, T)."""
    return _with_room(RelativePositionBias.forward(source), admitted_tokens(source))


def _with_room(bias: Tensor, count: int) -> Tensor:
    """Put rows and columns of zeros behind the class token: (..., T, T) -> (..., T + count, T + count)."""
    rows = bias.new_zeros(*bias.shape[:-2], count, bias.shape[-1])
    bias = cat([bias[..., :PREFIX, :], rows, bias[..., PREFIX:, :]], dim=-2)
    columns = bias.new_zeros(*bias.shape[:-1], count)
    return cat([bias[..., :PREFIX], columns, bias[..., PREFIX:]], dim=-1)
