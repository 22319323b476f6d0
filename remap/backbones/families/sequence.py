"""What the families of one sequence of tokens share: ViT, Eva and BEiT.

Letters: B batch, T tokens, H heads, h head width, E = H * h.
"""

from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock
from remap.backbones.families.base import Family
from remap.backbones.families.reading import pair, real
from remap.backbones.typed import M, submodule

SequenceModel = VisionTransformer | Eva | Beit
SelfAttention = Attention | EvaAttention | AttentionRope | BeitAttention


class SequenceFamily(Family[M]):
    """A family whose blocks are one list in ``model.blocks``."""

    def remove_blocks(self, model: M, indices: Sequence[int]) -> None:
        blocks = model.get_submodule("blocks")
        assert isinstance(blocks, nn.Sequential | nn.ModuleList)
        for index in sorted(indices, reverse=True):
            del blocks[index]


def sequence_anatomy(
    model: SequenceModel,
    family: str,
    read_block: Callable[[str, tuple[int, int]], AttentionBlock],
    *,
    num_prefix_tokens: int,
    patch_size: tuple[int, int] | None = None,
    distilled: bool = False,
) -> Anatomy:
    """Return the anatomy of a model of one sequence of tokens.

    Args:
        read_block: From a block's path and the grid to the block.
        patch_size: Where it is not that of the embedding.
        distilled: Whether it has a second classifier, for a distillation token.
    """
    embedding: Any = model.patch_embed
    grid = pair(embedding.grid_size)
    blocks = tuple(read_block(f"blocks.{index}", grid) for index in range(len(model.blocks)))
    last = blocks[-1]
    final_norm = next(iter(real(model, ("norm", "fc_norm"))), None)
    outside = real(model, ("patch_embed.norm", "norm_pre", "norm", "attn_pool.norm", "fc_norm"))
    unpooled = getattr(model, "attn_pool", None) is None and isinstance(model.fc_norm, nn.Identity)
    reads_class_token = unpooled and model.global_pool == "token" and model.cls_token is not None
    return Anatomy(
        family=family,
        width=model.embed_dim,
        depth=len(blocks),
        heads=last.heads,
        head_dim=last.head_dim,
        mlp_hidden=last.mlp_hidden,
        image_size=pair(embedding.img_size),
        patch_size=patch_size or pair(embedding.patch_size),
        grid=grid,
        num_prefix_tokens=num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        class_token_pooled=reads_class_token and not distilled,
        input_module="patch_embed",
        embedding_norms=tuple(path for path in outside if path != final_norm),
        final_norm=final_norm,
        classifier_heads=("head", "head_dist") if distilled else ("head",),
        blocks=blocks,
    )


def attention_of(model: nn.Module, index: int, kind: type[M]) -> M:
    """Return the attention module of a block."""
    return submodule(model, f"blocks.{index}.attn", kind)


def watch_queries_and_keys(
    attention: nn.Module, ready: Callable[[Tensor, Tensor, Tensor | None], None], *, values: bool
) -> list[RemovableHandle]:
    """Call ``ready`` with q, k and (with ``values``) v, (B, H, T, h) each, behind the norms of queries and keys.

    The norms are called in every pass, as Identity where there are none, and the query's comes first.
    """
    this_pass: dict[str, Tensor] = {}

    def v_ready(v: Tensor) -> None:
        this_pass["v"] = v

    def q_ready(_module: nn.Module, _args: tuple, q: Tensor) -> None:
        this_pass["q"] = q

    def k_ready(_module: nn.Module, _args: tuple, k: Tensor) -> None:
        ready(this_pass.pop("q"), k, this_pass.pop("v", None))

    return [
        *(watch_values(attention, v_ready) if values else ()),
        submodule(attention, "q_norm", nn.Module).register_forward_hook(q_ready),
        submodule(attention, "k_norm", nn.Module).register_forward_hook(k_ready),
    ]


def watch_values(attention: nn.Module, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Call ``keep`` with an attention module's values (B, H, T, h) in every forward, before its query and key norms.

    Where the module reads its qkv layer's weight instead of calling the layer, they are made here from the same
    weight and bias, as the queries and keys in BEiT are.
    """
    module: Any = attention  # several classes of timm with the same names inside

    def heads(v_BTE: Tensor) -> None:
        keep(v_BTE.unflatten(-1, (module.num_heads, -1)).transpose(1, 2))

    if module.qkv is None:
        return [module.v_proj.register_forward_hook(lambda _module, _args, v_BTE: heads(v_BTE))]
    owned_bias = getattr(module, "v_bias", None) is not None
    if owned_bias and not module.qkv_bias_separate:

        def begins(_module: nn.Module, args: tuple) -> None:
            bias = module.v_bias
            heads(F.linear(args[0], module.qkv.weight[-bias.numel() :], bias))

        return [attention.register_forward_pre_hook(begins)]

    def qkv_ready(_module: nn.Module, _args: tuple, qkv_BTE: Tensor) -> None:
        v_BTE = qkv_BTE[..., -(qkv_BTE.shape[-1] // 3) :]
        # timm adds separate biases in place, behind this hook; the sum must not see them twice.
        heads(v_BTE + module.v_bias if owned_bias else v_BTE)

    return [module.qkv.register_forward_hook(qkv_ready)]
