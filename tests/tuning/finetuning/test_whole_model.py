"""full, linear, partial and mlp: the whole tiny model written out again from the papers, in float64.

Sources of the formulas: Dosovitskiy et al. 2020 (2010.11929) equations 1 to 4 for the transformer, Touvron et al.
2021 for LayerScale (2103.17239) and the distillation token (2012.12877), Zhai et al. 2023 (2303.15343) for the
attention-pooled head, Jia et al. 2022 (2203.12119) for the hidden layers of MLP-k. Nothing here calls timm's or
remap's forward.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.tuning.attached import Attached

HEADS, DEPTH, PATCH = 2, 3, 8

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1, dtype=x.dtype))


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.weight" not in w:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    hidden = linear(w, f"{name}.fc1", x)
    return linear(w, f"{name}.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, tokens, D) each -> (B, query tokens, D): softmax(q k^T / sqrt(h)) v for each head."""
    heads = []
    for q_h, k_h, v_h in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
        scores = torch.exp(q_h @ k_h.mT / math.sqrt(q_h.shape[-1]))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v_h)
    return torch.cat(heads, -1)


def per_head_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return torch.cat([layer_norm(w, name, head) for head in x.chunk(HEADS, -1)], -1)


def block(w: Weights, at: str, x: Tensor) -> Tensor:
    q, k, v = linear(w, f"{at}.attn.qkv", layer_norm(w, f"{at}.norm1", x)).chunk(3, -1)
    q, k = per_head_norm(w, f"{at}.attn.q_norm", q), per_head_norm(w, f"{at}.attn.k_norm", k)
    x = x + linear(w, f"{at}.attn.proj", attend(q, k, v)) * w.get(f"{at}.ls1.gamma", 1.0)
    return x + mlp(w, f"{at}.mlp", layer_norm(w, f"{at}.norm2", x)) * w.get(f"{at}.ls2.gamma", 1.0)


def embed(w: Weights, images: Tensor) -> tuple[Tensor, int]:
    """Tokens (B, prefix + patches, D) with positions, and the number of prefix tokens."""
    kernel = w["patch_embed.proj.weight"]
    rows = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    patches = rows @ kernel.flatten(1).T + w.get("patch_embed.proj.bias", torch.zeros(1, dtype=images.dtype))
    names = [name for name in ("cls_token", "dist_token", "reg_token") if name in w]
    prefix = [w[name].expand(len(images), -1, -1) for name in names]
    count = sum(tokens.shape[1] for tokens in prefix)
    positions = w["pos_embed"]
    if positions.shape[1] == patches.shape[1]:  # positions for patches only (DINOv2 with registers, SigLIP)
        return layer_norm(w, "norm_pre", torch.cat([*prefix, patches + positions], 1)), count
    return layer_norm(w, "norm_pre", torch.cat([*prefix, patches], 1) + positions), count


def hidden_layers(w: Weights, x: Tensor) -> Tensor:
    """MLP-k's relu and batch norm over what was seen so far, where ``w`` has them."""
    for index in range(sum(name.startswith("remap_mlp.linears.") for name in w) // 2):
        at = f"remap_mlp.norms.{index}"
        x = linear(w, f"remap_mlp.linears.{index}", x).clamp(min=0)
        x = (x - w[f"{at}.running_mean"]) / (w[f"{at}.running_var"] + 1e-5).sqrt()
        x = x * w[f"{at}.weight"] + w[f"{at}.bias"]
    return x


def head(w: Weights, x: Tensor, prefix: int) -> Tensor:
    """Logits (B, C) from the tokens after the last block."""
    x = layer_norm(w, "norm", x)
    if "attn_pool.latent" in w:
        k, v = linear(w, "attn_pool.kv", x).chunk(2, -1)
        query = linear(w, "attn_pool.q", w["attn_pool.latent"]).expand(len(x), -1, -1)
        pooled = linear(w, "attn_pool.proj", attend(query, k, v))
        pooled = pooled + mlp(w, "attn_pool.mlp", layer_norm(w, "attn_pool.norm", pooled))
        return linear(w, "head", hidden_layers(w, pooled[:, 0]))
    if "head_dist.weight" in w:
        both = [linear(w, name, hidden_layers(w, x[:, i])) for i, name in enumerate(("head", "head_dist"))]
        return sum(both) / 2
    if "fc_norm.weight" in w:
        return linear(w, "head", hidden_layers(w, layer_norm(w, "fc_norm", x[:, prefix:].mean(1))))
    return linear(w, "head", hidden_layers(w, x[:, 0]))


def reference(w: Weights, images: Tensor) -> Tensor:
    x, prefix = embed(w, images)
    for index in range(DEPTH):
        x = block(w, f"blocks.{index}", x)
    return head(w, x, prefix)


@pytest.mark.parametrize("variant", ["plain", "dinov2_registers", "deit_distilled", "siglip", "clip", "avg_pool"])
@pytest.mark.parametrize("method", ["full", "linear", "partial", "mlp"])
def test_whole_model_equals_the_papers_formulas(
    build: Build, attach: Attach, tools: SimpleNamespace, method: str, variant: str
) -> None:
    base, images = build(variant).double(), tools.images().double()
    weights = base.state_dict()
    assert torch.allclose(base(images), reference(weights, images), rtol=0, atol=1e-10), "the reference itself"
    attached = attach(method, build(variant).double())
    tools.shake(attached)
    state = attached.state()
    for name, value in state.items():
        if "running_" in name:
            state[name] = value + torch.rand(value.shape, dtype=value.dtype)
    attached.load(state)
    tuned = reference({**weights, **state}, images)
    assert torch.allclose(attached.model(images), tuned, rtol=0, atol=1e-10)
    moved = (tuned - reference(weights, images)).abs().max() > 1e-5
    assert moved == (method != "linear")
