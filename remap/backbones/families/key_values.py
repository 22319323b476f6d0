"""Attention of sequence models with more keys and values than those of the tokens.

timm's attention modules have no place where keys and values could be lengthened, so their forward is written again
here. It reads and calls the same layers in the same order (hooks on them keep working) and takes the same arguments.

Letters: B batch, T tokens, H heads, h head width, n keys and values that belong to no token.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.layers.attention import resolve_self_attn_mask
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import plain_class
from remap.backbones.families.base import Undo
from remap.backbones.families.beit import position_bias
from remap.backbones.families.eva import RotaryAttention, rotated
from remap.backbones.families.sequence import SelfAttention

MoreKeysAndValues = Callable[[Tensor], tuple[Tensor, Tensor]]


def extend_attention(attention: nn.Module, more: MoreKeysAndValues) -> Undo:
    """Let every query also attend to the keys and values that ``more`` gives.

    They stand in front of the tokens' own, behind norms and rotation, without a position bias.

    Args:
        attention: The attention module of a block of a sequence model.
        more: From the tokens' keys (B, H, T, h) to keys and values (B, H, n, h). To survive ``copy.deepcopy`` it is a
            bound method or a partial of one.
    """
    forwards: dict[type[nn.Module], Callable[..., Tensor]] = {
        Attention: _plain_forward,
        EvaAttention: _rotary_forward,
        AttentionRope: _rotary_forward,
        BeitAttention: _biased_forward,
    }
    own = {"forward": MethodType(forwards[plain_class(attention)], attention), "more_keys_and_values": more}
    attention.__dict__.update(own)

    def undo() -> None:
        for name in own:
            del attention.__dict__[name]

    return undo


def _plain_forward(attention: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return _rotary_forward(attention, x, None, attn_mask, is_causal)


def _rotary_forward(
    attention: Attention | RotaryAttention,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    q, k, v = _heads(attention, x)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if not isinstance(attention, Attention):
        q, k = rotated(attention, q, rope), rotated(attention, k, rope)
    return _output(attention, _attend(attention, q, k, v, resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)))


def _biased_forward(attention: BeitAttention, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    q, k, v = _heads(attention, x)
    return _output(attention, _attend(attention, q, k, v, position_bias(attention, shared_rel_pos_bias)))


def _heads(attention: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, (B, H, T, h) each, made as the module itself makes them."""
    module: Any = attention  # not every class has each of the names below
    if module.qkv is None:
        q, k, v = (
            layer(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
        return q, k, v
    if getattr(module, "q_bias", None) is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        qkv = module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)
    return qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return (B, T, H * h) from q, k and v, (B, H, T, h) each, and the additive bias (..., T, T)."""
    more_k, more_v = attention.__dict__["more_keys_and_values"](k)
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


def _output(attention: SelfAttention, mixed_BTE: Tensor) -> Tensor:
    norm = getattr(attention, "norm", None)
    return attention.proj_drop(attention.proj(mixed_BTE if norm is None else norm(mixed_BTE)))
