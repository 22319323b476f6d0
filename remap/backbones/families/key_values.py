"""Attention of sequence models with keys and values beside those of the tokens.

timm's attention modules have no place where keys and values could be lengthened, so their forward is written again
here. It reads and calls the same layers in the same order (hooks on them keep working) and takes the same arguments.

Letters: B batch, T tokens, H heads, h head width, n keys and values that belong to no token.
"""

from collections.abc import Callable
from types import MethodType

import torch
from timm.layers import Attention, AttentionRope
from timm.layers.attention import resolve_self_attn_mask
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import plain_class
from remap.backbones.families.base import Undo
from remap.backbones.families.eva import rotated

MoreKeysAndValues = Callable[[Tensor], tuple[Tensor, Tensor]]


def extend_attention(attention: nn.Module, more: MoreKeysAndValues) -> Undo:
    """Let every query also attend to the keys and values that ``more`` gives.

    They stand in front of the tokens' own, behind norms and rotation, without a position bias.

    Args:
        attention: The attention module of a block of a sequence model.
        more: From the tokens' keys (B, H, T, h) to keys and values (B, H, n, h). To survive ``copy.deepcopy`` it is a
            bound method or a partial of one.
    """
    forward = {
        Attention: _plain_forward,
        EvaAttention: _rotary_forward,
        AttentionRope: _rotary_forward,
        BeitAttention: _biased_forward,
    }[plain_class(attention)]
    attention.more_keys_and_values = more
    attention.forward = MethodType(forward, attention)

    def undo() -> None:
        del attention.forward
        del attention.more_keys_and_values

    return undo


def _plain_forward(attention: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = _heads(attention, x)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return _output(attention, _attend(attention, q, k, v, resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)))


def _rotary_forward(
    attention: EvaAttention | AttentionRope,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    q, k, v = _heads(attention, x)
    q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = rotated(attention, q, rope), rotated(attention, k, rope)
    return _output(attention, _attend(attention, q, k, v, resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)))


def _biased_forward(attention: BeitAttention, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    q, k, v = _heads(attention, x)
    bias = shared_rel_pos_bias
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    return _output(attention, _attend(attention, q, k, v, bias))


def _heads(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B, H, T, h) each, made as the module itself makes them."""
    if attention.qkv is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        return tuple(layer(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for layer in layers)
    if getattr(attention, "q_bias", None) is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        separate = attention.qkv_bias_separate
        qkv = attention.qkv(x) + bias if separate else F.linear(x, attention.qkv.weight, bias)
    return qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, T, H * h) from q, k and v, (B, H, T, h) each, and the additive bias (..., T, T)."""
    more_k, more_v = attention.more_keys_and_values(k)
    k, v = torch.cat([more_k.type_as(k), k], dim=2), torch.cat([more_v.type_as(v), v], dim=2)
    if bias is not None:
        bias = F.pad(bias, (more_k.shape[2], 0))
    if attention.fused_attn:
        dropped = attention.attn_drop.p if attention.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
    else:
        scores = (q * attention.scale) @ k.mT
        mixed = attention.attn_drop((scores if bias is None else scores + bias).softmax(dim=-1)) @ v
    return mixed.transpose(1, 2).flatten(2)


def _output(attention: nn.Module, mixed_BTE: Tensor) -> Tensor:
    norm = getattr(attention, "norm", None)
    return attention.proj_drop(attention.proj(mixed_BTE if norm is None else norm(mixed_BTE)))
