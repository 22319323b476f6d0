"""Plain vision transformers: ViT, DeiT, DeiT-III, DINOv2, CLIP and SigLIP towers."""

from functools import partial
from typing import Any

from timm.layers import Attention
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock, AttentionScores
from remap.backbones.families.base import KeepScores, Undo
from remap.backbones.families.reading import MLPS, attention_block, exactly, pair, run_blocks
from remap.backbones.families.sequence import SequenceFamily, attention_of, sequence_anatomy, watch_queries_and_keys
from remap.backbones.typed import submodule


class PlainViT(SequenceFamily[VisionTransformer]):
    """timm's ``VisionTransformer`` with its standard block."""

    name = "vit"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer) and has_standard_blocks(model)

    def read(self, model: VisionTransformer) -> Anatomy:
        embedding: Any = model.patch_embed
        return sequence_anatomy(
            model,
            self.name,
            partial(standard_block, model),
            num_prefix_tokens=model.num_prefix_tokens,
            # The ratio, because the hybrid stems have a patch size of 1 behind a strided network.
            patch_size=pair(embedding.feat_ratio(as_scalar=False)),
            distilled=hasattr(model, "dist_token"),
        )

    def rest_of_forward(self, model: VisionTransformer, index: int, x: Tensor) -> Tensor:
        return model.norm(run_blocks(model.blocks[index:], x, model.grad_checkpointing))

    def shape_arguments(self, anatomy: Anatomy, depth: int, width: int, heads: int, mlp: int) -> dict[str, object]:
        if "fc1_gate" in anatomy.blocks[0].projections:
            return {"depth": depth}
        return {"depth": depth, "embed_dim": width, "num_heads": heads, "mlp_ratio": mlp_ratio(mlp, width)}

    def unprunable(self, model: VisionTransformer) -> str | None:
        pooled = getattr(model, "attn_pool", None) is not None
        return "it pools by attention, with its own heads" if pooled else None

    def set_heads(self, model: VisionTransformer, block: AttentionBlock, heads: int, head_dim: int) -> None:
        attention = submodule(model, block.attn, Attention)
        attention.num_heads, attention.head_dim, attention.attn_dim = heads, head_dim, heads * head_dim
        attention.scale = head_dim**-0.5

    def set_width(self, model: VisionTransformer, width: int) -> None:
        model.embed_dim = model.num_features = model.head_hidden_size = width

    def admit_tokens(self, model: VisionTransformer, count: int, first: int = 0) -> Undo:
        # Plain attention takes a sequence of any length.
        return lambda: None

    def watch_attention(
        self, model: VisionTransformer, index: int, keep: KeepScores, *, values: bool = False
    ) -> list[RemovableHandle]:
        attention = attention_of(model, index, Attention)

        def ready(q: Tensor, k: Tensor, v: Tensor | None) -> None:
            keep(AttentionScores(q * attention.scale, k, v_BHTh=v))

        return watch_queries_and_keys(attention, ready, values=values)


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio from which timm computes exactly ``hidden`` units: it rounds their product down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def has_standard_blocks(model: VisionTransformer | NaFlexVit) -> bool:
    """Return whether a model has blocks, and all of them are timm's standard block with its attention and an MLP."""
    return len(model.blocks) > 0 and all(
        exactly(block, Block)
        and exactly(block.attn, Attention)
        and block.attn.gate is None
        and exactly(block.mlp, *MLPS)
        for block in model.blocks
    )


def standard_block(model: VisionTransformer | NaFlexVit, path: str, grid: tuple[int, int]) -> AttentionBlock:
    """Return a standard block; without a norm of keys its scores are q k^T alone."""
    plain = isinstance(submodule(model, f"{path}.attn.k_norm", nn.Module), nn.Identity)
    return attention_block(model, path, width=model.embed_dim, grid=grid, plain_scores=plain)
