"""Transformers of timm's Eva class, most of them rotary: EVA, EVA-02, DINOv3, Perception Encoder."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import checkpoint
from timm.models.eva import Eva as TimmEva
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, cat, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionScores
from remap.backbones.families.base import KeepScores, Undo
from remap.backbones.families.reading import MLPS, attention_block, exactly
from remap.backbones.families.sequence import SequenceFamily, sequence_anatomy, watch_queries_and_keys
from remap.errors import BackboneError

RotaryAttention = EvaAttention | AttentionRope


class Eva(SequenceFamily[TimmEva]):
    """timm's ``Eva`` with its pre-norm block, as many key heads as query heads and no gate."""

    name = "eva"

    def matches(self, model: nn.Module) -> bool:
        return (
            isinstance(model, TimmEva)
            and len(model.blocks) > 0
            and all(exactly(block, EvaBlock) and _regular(block) for block in model.blocks)
        )

    def read(self, model: TimmEva) -> Anatomy:
        read_block = partial(attention_block, model, width=model.embed_dim)
        return sequence_anatomy(
            model, self.name, lambda path, grid: read_block(path, grid=grid), num_prefix_tokens=model.num_prefix_tokens
        )

    def rest_of_forward(self, model: TimmEva, index: int, x: Tensor) -> Tensor:
        rope = _rope(model)
        for number, block in enumerate(model.blocks[index:], start=index):
            # A mixed embedding has one row of angles a block.
            angles = rope[number] if rope is not None and model.rope_mixed else rope
            x = checkpoint(block, x, rope=angles) if model.grad_checkpointing else block(x, rope=angles)
        return model.norm(x)

    def remove_blocks(self, model: TimmEva, indices: Sequence[int]) -> None:
        if model.rope_mixed:
            raise BackboneError(
                "blocks with their own rotations cannot be taken out",
                given=f"{type(model).__name__} with a mixed rotary embedding",
                allowed="networks whose blocks share their positions",
            )
        super().remove_blocks(model, indices)

    def admit_tokens(self, model: TimmEva, count: int, first: int = 0) -> Undo:
        attentions = [_attention(model, index) for index in range(first, len(model.blocks))]

        def admit(count: int) -> None:
            # Tokens of the prefix keep their queries and keys unrotated.
            for attention in attentions:
                attention.num_prefix_tokens += count

        admit(count)
        return lambda: admit(-count)

    def watch_attention(
        self, model: TimmEva, index: int, keep: KeepScores, *, values: bool = False
    ) -> list[RemovableHandle]:
        attention, ropes = _attention(model, index), list[Tensor | None]()

        def begins(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ropes[:] = [args[1] if len(args) > 1 else kwargs.get("rope")]

        def ready(q: Tensor, k: Tensor, v: Tensor | None) -> None:
            rope = ropes.pop()
            q, k = rotated(attention, q, rope) * attention.scale, rotated(attention, k, rope)
            keep(AttentionScores(q, k, v_BHTh=v))

        return [
            attention.register_forward_pre_hook(begins, with_kwargs=True),
            *watch_queries_and_keys(attention, ready, values=values),
        ]


def rotated(attention: RotaryAttention, x_BHTh: Tensor, rope: Tensor | None) -> Tensor:
    """Return queries or keys with their rotation, which leaves the prefix out."""
    if rope is None:
        return x_BHTh
    prefix = attention.num_prefix_tokens
    turned = apply_rot_embed_cat(x_BHTh[:, :, prefix:], rope, half=attention.rotate_half)
    return cat([x_BHTh[:, :, :prefix], turned], dim=2).type_as(x_BHTh)


def _attention(model: TimmEva, index: int) -> RotaryAttention:
    attention = model.get_submodule(f"blocks.{index}.attn")
    assert isinstance(attention, RotaryAttention)
    return attention


def _regular(block: EvaBlock) -> bool:
    attention = block.attn
    return (
        exactly(attention, EvaAttention, AttentionRope)
        and attention.gate is None
        and getattr(attention, "num_kv_groups", 1) == 1
        and exactly(block.mlp, *MLPS)
    )


def _rope(model: TimmEva) -> Tensor | None:
    """Return the rotary embedding of the model's own grid, as its forward makes it."""
    if model.rope is None:
        return None
    if model.training and model.patch_drop is not None:
        raise BackboneError(
            "the rest of a rotary model's forward cannot be run with patch dropout",
            given="which patches were dropped is not known any more",
            do="build the model without patch_drop_rate",
        )
    rope: Any = model.rope
    if not model.dynamic_img_size and hasattr(rope, "feat_shape"):
        return rope.get_embed()
    embedding: Any = model.patch_embed
    return rope.get_embed(shape=embedding.grid_size)
