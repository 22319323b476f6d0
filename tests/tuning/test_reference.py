"""The whole tiny model written out again from the papers, in float64, and parameter counts on ViT-B/16.

Sources of the formulas: Dosovitskiy et al. 2020 (2010.11929) equations 1 to 4 for the transformer, Touvron et al.
2021 for LayerScale (2103.17239) and the distillation token (2012.12877), Zhai et al. 2023 (2303.15343) for the
attention-pooled head, Jia et al. 2022 (2203.12119) equations 4 to 7 for the prompts, Chen et al. 2022
(2205.13535) equations 3 and 4 for the adapter. Nothing here calls timm's or remap's forward.
"""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning import METHODS
from remap.tuning.base import Attached

HEADS, DEPTH, PATCH, ADAPTER_SCALE = 2, 3, 8, 0.1
ALL_PARAMETERS = 85_798_656

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1, dtype=x.dtype))


def layer_norm(w: Weights, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    if f"{name}.weight" not in w:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", gelu(linear(w, f"{name}.fc1", x)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, tokens, D) each -> (B, query tokens, D): softmax(q k^T / sqrt(h)) v for each head."""
    heads = []
    for q_h, k_h, v_h in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
        scores = torch.exp(q_h @ k_h.mT / math.sqrt(q_h.shape[-1]))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v_h)
    return torch.cat(heads, -1)


def per_head_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return torch.cat([layer_norm(w, name, head) for head in x.chunk(HEADS, -1)], -1)


def block(w: Weights, index: int, x: Tensor) -> Tensor:
    """One pre-norm block; with AdaptFormer's weights in ``w`` the bottleneck runs beside the MLP branch."""
    at = f"blocks.{index}"
    q, k, v = linear(w, f"{at}.attn.qkv", layer_norm(w, f"{at}.norm1", x)).chunk(3, -1)
    q, k = per_head_norm(w, f"{at}.attn.q_norm", q), per_head_norm(w, f"{at}.attn.k_norm", k)
    x = x + linear(w, f"{at}.attn.proj", attend(q, k, v)) * w.get(f"{at}.ls1.gamma", 1.0)
    branch = mlp(w, f"{at}.mlp", layer_norm(w, f"{at}.norm2", x)) * w.get(f"{at}.ls2.gamma", 1.0)
    return x + branch + adapter(w, f"{at}.adaptformer", x)


def adapter(w: Weights, at: str, x: Tensor) -> Tensor | float:
    if f"{at}.down.weight" not in w:
        return 0.0
    normed_first = f"{at}.norm.weight" in w
    hidden = linear(w, f"{at}.down", layer_norm(w, f"{at}.norm", x, eps=1e-5) if normed_first else x)
    return ADAPTER_SCALE * linear(w, f"{at}.up", hidden.clamp(min=0))


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


def head(w: Weights, x: Tensor, prefix: int) -> Tensor:
    """Logits (B, C) from the tokens after the last block."""
    x = layer_norm(w, "norm", x)
    if "attn_pool.latent" in w:
        k, v = linear(w, "attn_pool.kv", x).chunk(2, -1)
        query = linear(w, "attn_pool.q", w["attn_pool.latent"]).expand(len(x), -1, -1)
        pooled = linear(w, "attn_pool.proj", attend(query, k, v))
        pooled = pooled + mlp(w, "attn_pool.mlp", layer_norm(w, "attn_pool.norm", pooled))
        return linear(w, "head", pooled[:, 0])
    if "head_dist.weight" in w:
        return (linear(w, "head", x[:, 0]) + linear(w, "head_dist", x[:, 1])) / 2
    if "fc_norm.weight" in w:
        return linear(w, "head", layer_norm(w, "fc_norm", x[:, prefix:].mean(1)))
    return linear(w, "head", x[:, 0])


def reference(w: Weights, images: Tensor) -> Tensor:
    """The network; prompts in ``w`` are concatenated once (one row) or replaced in front of every block."""
    x, prefix = embed(w, images)
    prompts = w.get("remap_prompts.prompts", torch.zeros(1, 0, x.shape[-1], dtype=x.dtype))
    length, patches = prompts.shape[1], x.shape[1] - prefix
    x = torch.cat([x[:, :prefix], prompts[0].expand(len(x), -1, -1), x[:, prefix:]], 1)
    for index in range(DEPTH):
        if index > 0 and len(prompts) > 1:
            x = torch.cat([x[:, :prefix], prompts[index].expand(len(x), -1, -1), x[:, prefix + length :]], 1)
        x = block(w, index, x)
    return head(w, torch.cat([x[:, :prefix], x[:, -patches:]], 1), prefix)


def test_whole_model_equals_the_papers_formulas(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace, method: str, family: str
) -> None:
    base = build(family).double()
    images = tools.images().double()
    weights = base.state_dict()
    assert torch.allclose(base(images), reference(weights, images), rtol=0, atol=1e-10), "the reference itself"
    attached = attach(method, build(family).double())
    tools.shake(attached)
    tuned = reference({**weights, **{name: value.double() for name, value in attached.state().items()}}, images)
    assert torch.allclose(attached.model(images), tuned, rtol=0, atol=1e-10)
    moved = (tuned - reference(weights, images)).abs().max() > 1e-5
    assert moved == (method != "linear")


def test_adaptformer_normalises_its_input_when_asked(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace, family: str
) -> None:
    attached = attach("adaptformer", build(family).double(), layernorm="in")
    tools.shake(attached)
    weights, images = attached.model.state_dict(), tools.images().double()
    assert torch.allclose(attached.model(images), reference(weights, images), rtol=0, atol=1e-10)


def test_adaptformer_normalises_its_output_when_asked(
    build: Callable[..., nn.Module], attach: Callable[..., Attached]
) -> None:
    """Normalised without scale and shift, the output has mean 0 and variance 1 in every token, whatever the scale."""
    attached = attach("adaptformer", build("plain"), layernorm="out", scale=5.0)
    adapter_module = attached.model.blocks[0].adaptformer
    for parameter in (adapter_module.up.weight, adapter_module.up.bias):
        nn.init.normal_(parameter)
    out = adapter_module(torch.randn(2, 17, 32))
    assert torch.allclose(out.mean(-1), torch.zeros(2, 17), atol=1e-5)
    assert torch.allclose(out.var(-1, unbiased=False), torch.ones(2, 17), atol=1e-3)


def test_prompts_start_uniform_within_the_papers_bound(
    build: Callable[..., nn.Module], attach: Callable[..., Attached]
) -> None:
    """uniform(-v, v), v = sqrt(6 / (3*8*8 + 32)) = 0.16366; its standard deviation is v / sqrt(3)."""
    attached = attach("vpt_deep", build("plain"), num_prompts=200)
    prompts = attached.state()["remap_prompts.prompts"]
    assert prompts.shape == (3, 200, 32)
    assert 0.1630 < prompts.abs().max() <= 0.16367
    assert abs(prompts.std() - 0.16366 / math.sqrt(3)) < 0.002


def test_shallow_prompts_lost_between_blocks_are_an_error(
    build: Callable[..., nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    attached = attach("vpt_shallow", build("plain"))
    handle = attached.model.blocks[0].register_forward_hook(lambda module, args, output: output.clone())
    with pytest.raises(BackboneError, match="input of block 1"):
        attached.model(tools.images())
    handle.remove()
    assert attached.model(tools.images()).shape == (2, 5)


@pytest.fixture(scope="module")
def vit_b16() -> Iterator[nn.Module]:
    """ViT-B/16 without a head; shapes only, so no memory."""
    with torch.device("meta"):
        yield timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)


# VPT, section 4 and its code's defaults; AdaptFormer, table 1 (1.19 M); biases counted by hand: a block has
# 2,304 + 768 + 3,072 + 768 without norms and 2 * 768 in norms, plus 768 in the patch embedding and the final norm.
@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("full", {}, ALL_PARAMETERS),
        ("linear", {}, 0),
        ("vpt_shallow", {"num_prompts": 50}, 50 * 768),
        ("vpt_deep", {"num_prompts": 50}, 460_800),
        ("vpt_deep", {}, 92_160),
        ("adaptformer", {}, 1_189_632),
        ("adaptformer", {"bottleneck": 8}, 156_768),
        ("adaptformer", {"layernorm": "in"}, 1_189_632 + 12 * 1_536),
        ("bitfit", {}, 102_912),
        ("bitfit", {"biases": "no_norm"}, 83_712),
        ("bitfit", {"biases": "blocks"}, 12 * (2_304 + 768 + 3_072 + 768 + 2 * 768)),
    ],
)
def test_trainable_parameters_on_vit_b16(vit_b16: nn.Module, method: str, options: dict, count: int) -> None:
    cls = METHODS.load(method)
    attached = cls(cls.Config(**options)).attach(vit_b16, anatomy_of(vit_b16))
    parameters = dict(vit_b16.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == count
    attached.detach()
    assert sum(p.numel() for p in vit_b16.parameters()) == ALL_PARAMETERS


@pytest.mark.parametrize(("method", "percent"), [("vpt_shallow", "0.04"), ("vpt_deep", "0.53")])
def test_percentage_that_vpt_prints(vit_b16: nn.Module, method: str, percent: str) -> None:
    """Tuned over total in percent, prompts in the total and no head, 50 prompts (log_model_info of VPT's code)."""
    cls = METHODS.load(method)
    attached = cls(cls.Config(num_prompts=50)).attach(vit_b16, anatomy_of(vit_b16))
    parameters = dict(vit_b16.named_parameters())
    tuned = sum(parameters[name].numel() for name in attached.trainable)
    total = sum(p.numel() for p in parameters.values())
    attached.detach()
    assert f"{100 * tuned / total:.2f}" == percent
