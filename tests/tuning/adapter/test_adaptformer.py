"""AdaptFormer against its formula, in float64 on whole tiny models.

Source: Chen et al. 2022 (2205.13535) equations 3 and 4. The frozen parts are an untouched timm model's; the adapter
and the residual sums are written out.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.tuning.attached import Attached

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Weights = dict[str, Tensor]


def layer_norm(w: Weights, at: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]


def bottleneck(w: Weights, at: str, x: Tensor, scale: float, layernorm: str) -> Tensor:
    if layernorm == "in":
        x = layer_norm(w, f"{at}.norm", x)
    hidden = (x @ w[f"{at}.down.weight"].T + w[f"{at}.down.bias"]).clamp(min=0)
    out = scale * (hidden @ w[f"{at}.up.weight"].T + w[f"{at}.up.bias"])
    return layer_norm(w, f"{at}.norm", out) if layernorm == "out" else out


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("plain", {}),
        ("dinov2_registers", {"layernorm": "in"}),
        ("eva02", {"scale": 2.0}),
        ("dinov3", {}),
        ("beit", {"layernorm": "out", "scale": 0.5}),
        ("swin", {}),
    ],
)
def test_whole_model_equals_the_formula(
    build: Build, attach: Attach, rewire: Callable, tools: SimpleNamespace, variant: str, options: dict
) -> None:
    attached = attach("adaptformer", build(variant).double(), **options)
    tools.shake(attached)
    weights, images = attached.state(), tools.images().double()

    def formula(at: str, block: nn.Module, x: Tensor, attn: Callable, mlp: Callable) -> Tensor:
        x = x + attn(block.norm1(x))
        settings = {"scale": 0.1, "layernorm": "none", **options}
        return x + mlp(block.norm2(x)) + bottleneck(weights, f"{at}.remap_adaptformer", x, **settings)

    untouched = build(variant).double()
    before = untouched(images)
    expected = rewire(untouched, formula)(images)
    assert torch.allclose(attached.model(images), expected, rtol=0, atol=1e-10)
    assert (expected - before).abs().max() > 1e-4
