"""SSF against the untouched timm model in float64.

Where a backbone calls its layers, the source is gamma * y + beta on the layers' outputs, by hooks on a plain model;
everywhere, gamma * W and gamma * b + beta in its weights. Which layers is written out from the paper and timm.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from remap.tuning.attached import Attached

Weights = dict[str, Tensor]
IN_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
SEPARATE = ("norm1", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "norm2", "mlp.fc1_g", "mlp.fc1_x")
SWIN = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
CONVNEXT = [f"stages.{i}.blocks.0" for i in range(4)]


def _layers(blocks: list[str], inside: tuple[str, ...], *outside: str) -> list[str]:
    return [f"{block}.{layer}" for block in blocks for layer in inside] + list(outside)


SEQUENCE = [f"blocks.{index}" for index in range(3)]
LAYERS = {
    "plain": _layers(SEQUENCE, IN_BLOCK, "patch_embed.proj", "norm"),
    "clip": _layers(SEQUENCE, IN_BLOCK, "patch_embed.proj", "norm_pre", "norm"),
    "dinov3": _layers(SEQUENCE, IN_BLOCK, "patch_embed.proj", "norm"),
    "eva02_separate": _layers(SEQUENCE, (*SEPARATE, "mlp.fc2"), "patch_embed.proj", "fc_norm"),
    "eva02": _layers(SEQUENCE, IN_BLOCK, "patch_embed.proj", "fc_norm"),
    "beit": _layers(SEQUENCE, IN_BLOCK, "patch_embed.proj", "fc_norm"),
    "swin": _layers(SWIN, IN_BLOCK, "patch_embed.proj", "patch_embed.norm", "layers.1.downsample.norm", "norm"),
    "convnext": _layers(
        CONVNEXT,
        ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
        "stem.0",
        "stem.1",
        *(f"stages.{i}.downsample.0" for i in (1, 2, 3)),
        "head.norm",
    ),
}
READ_PAST = ("eva02", "beit")  # their qkv layers are not called, and their biases are q_bias, k_bias = 0 and v_bias


@pytest.mark.parametrize("variant", list(LAYERS))
def test_equals_weights_changed_in_closed_form(shaken: Callable, plain_logits: Callable, variant: str) -> None:
    _, state, logits = shaken("ssf", variant)
    gammas = [name.removesuffix(".remap_ssf.gamma") for name in state if name.endswith("gamma")]
    assert sorted(gammas) == sorted(LAYERS[variant])

    def change(weights: Weights) -> None:
        for layer in LAYERS[variant]:
            gamma, beta = state[f"{layer}.remap_ssf.gamma"], state.get(f"{layer}.remap_ssf.beta")
            weight = weights[f"{layer}.weight"]
            weight *= gamma.view(-1, *[1] * (weight.ndim - 1))
            if variant in READ_PAST and layer.endswith("qkv"):
                attn = layer.removesuffix(".qkv")
                for name, gamma_third, beta_half in zip("qv", gamma.chunk(3)[::2], beta.chunk(2), strict=True):
                    bias = weights[f"{attn}.{name}_bias"]
                    bias.copy_(gamma_third * bias + beta_half)
            elif f"{layer}.bias" in weights:
                weights[f"{layer}.bias"].copy_(gamma * weights[f"{layer}.bias"] + beta)
            else:
                assert beta is None, "without a bias there is nowhere to put a shift"

    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-9)
    assert not torch.allclose(logits, plain_logits(variant), atol=1e-3)


@pytest.mark.parametrize("variant", [variant for variant in LAYERS if variant not in READ_PAST])
def test_equals_outputs_scaled_and_shifted(
    shaken: Callable, build: Callable, tools: SimpleNamespace, variant: str
) -> None:
    _, state, logits = shaken("ssf", variant)
    base = build(variant).double()
    for layer in LAYERS[variant]:
        gamma, beta = state[f"{layer}.remap_ssf.gamma"], state.get(f"{layer}.remap_ssf.beta", torch.zeros(1))

        def after(module: nn.Module, args: tuple, y: Tensor, gamma: Tensor = gamma, beta: Tensor = beta) -> Tensor:
            if isinstance(module, nn.Conv2d | LayerNorm2d):
                return (y.movedim(1, -1) * gamma + beta).movedim(-1, 1)
            return y * gamma + beta

        base.get_submodule(layer).register_forward_hook(after)
    with torch.no_grad():
        assert torch.allclose(logits, base(tools.images().double()), rtol=0, atol=1e-10)


def test_a_layer_without_bias_has_no_shift(build: Callable[..., nn.Module], attach: Callable[..., Attached]) -> None:
    """DINOv3 has no biases for queries, keys and values; BEiT has none for keys."""
    names = attach("ssf", build("dinov3")).trainable
    assert "blocks.0.attn.qkv.remap_ssf.gamma" in names and "blocks.0.attn.qkv.remap_ssf.beta" not in names
    state = attach("ssf", build("beit")).state()
    assert state["blocks.0.attn.qkv.remap_ssf.gamma"].shape == (96,)
    assert state["blocks.0.attn.qkv.remap_ssf.beta"].shape == (64,)


def test_count(count: Callable[..., int]) -> None:
    """Blocks: norm1, q, k, v, proj, norm2 and fc2 of 768, fc1 of 3,072; patch embedding and final norm."""
    assert count("ssf") == 12 * 2 * (7 * 768 + 3072) + 2 * 2 * 768 == 205_824
