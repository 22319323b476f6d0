"""DiffFit against the untouched timm model in float64, its LayerScale or the branches' last layers multiplied."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from remap.tuning.attached import Attached

Weights = dict[str, Tensor]
GAMMA = "remap_diffit.gamma"


@pytest.mark.parametrize(
    ("variant", "attn_scale", "mlp_scale"),
    [("dinov2_registers", "ls1.gamma", "ls2.gamma"), ("dinov3", "gamma_1", "gamma_2"), ("beit", "gamma_1", "gamma_2")],
)
def test_equals_a_layer_scale_multiplied(
    shaken: Callable, plain_logits: Callable, variant: str, attn_scale: str, mlp_scale: str
) -> None:
    """x + gamma1 * (ls1 * attn(x)), as in the paper: the scale acts on the whole branch."""
    _, state, logits = shaken("diffit", variant)

    def change(weights: Weights) -> None:
        _put_in_place(weights, state)
        for index in range(3):
            weights[f"blocks.{index}.{attn_scale}"] *= state[f"blocks.{index}.attn.proj.{GAMMA}"]
            weights[f"blocks.{index}.{mlp_scale}"] *= state[f"blocks.{index}.mlp.fc2.{GAMMA}"]

    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "eva02", "eva02_separate", "swin"])
def test_equals_last_layers_multiplied(shaken: Callable, plain_logits: Callable, variant: str) -> None:
    """Without a LayerScale: gamma * (W x + b) = (gamma W) x + gamma b."""
    _, state, logits = shaken("diffit", variant)

    def change(weights: Weights) -> None:
        _put_in_place(weights, state)
        for name, gamma in state.items():
            if name.endswith(GAMMA):
                layer = name.removesuffix(f".{GAMMA}")
                weights[f"{layer}.weight"] *= gamma[:, None]
                weights[f"{layer}.bias"] *= gamma

    assert torch.allclose(logits, plain_logits(variant, change), rtol=0, atol=1e-10)
    assert not torch.allclose(logits, plain_logits(variant, lambda w: _put_in_place(w, state)), atol=1e-3)


def test_what_trains(build: Callable[..., nn.Module], attach: Callable[..., Attached]) -> None:
    model = build("plain")
    own = {name for name, p in model.named_parameters() if name.endswith("bias") or ".norm" in name or "norm." in name}
    attached = attach("diffit", model)
    gammas = {f"blocks.{i}.{layer}.{GAMMA}" for i in range(3) for layer in ("attn.proj", "mlp.fc2")}
    assert set(attached.trainable) == {name for name in own if not name.startswith("head.")} | gammas
    assert set(attached.no_decay) == set(attached.trainable)


def test_count(count: Callable[..., int]) -> None:
    """102,912 biases, 25 norm weights, and two scales a block."""
    assert count("diffit") == 102_912 + 25 * 768 + 2 * 12 * 768 == 140_544


def _put_in_place(weights: Weights, state: Weights) -> None:
    for name, value in state.items():
        if not name.endswith(GAMMA):
            weights[name].copy_(value)
