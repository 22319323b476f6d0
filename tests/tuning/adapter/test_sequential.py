"""Houlsby, Pfeiffer and Adapter+ against their formulas, in float64 on whole tiny models.

Sources: Houlsby et al. 2019 (1902.00751) figure 2, Pfeiffer et al. 2020 (2005.00247), Steitz and Roth 2024
(2406.06820). The frozen parts are an untouched timm model's; the adapters and residual sums are written out.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Weights = dict[str, Tensor]

VARIANTS = ["dinov2_registers", "eva02", "dinov3", "beit", "swin"]


def bottleneck(w: Weights, at: str, x: Tensor) -> Tensor:
    hidden = x @ w[f"{at}.down.weight"].T + w[f"{at}.down.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return hidden @ w[f"{at}.up.weight"].T + w[f"{at}.up.bias"]


def houlsby(w: Weights, at: str, block: nn.Module, x: Tensor, attn: Callable, mlp: Callable) -> Tensor:
    h = attn(block.norm1(x))
    x = x + (h + bottleneck(w, f"{at}.remap_houlsby_attn", h))
    h = mlp(block.norm2(x))
    return x + (h + bottleneck(w, f"{at}.remap_houlsby_mlp", h))


def pfeiffer(w: Weights, at: str, block: nn.Module, x: Tensor, attn: Callable, mlp: Callable) -> Tensor:
    x = x + attn(block.norm1(x))
    h = mlp(block.norm2(x))
    return x + (h + bottleneck(w, f"{at}.remap_pfeiffer", h))


def adapter_plus(w: Weights, at: str, block: nn.Module, x: Tensor, attn: Callable, mlp: Callable) -> Tensor:
    x = x + attn(block.norm1(x))
    x = x + mlp(block.norm2(x))
    return x + w[f"{at}.remap_adapter_plus.scale"] * bottleneck(w, f"{at}.remap_adapter_plus", x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("formula", [houlsby, pfeiffer, adapter_plus])
def test_whole_model_equals_the_formula(
    build: Build, attach: Attach, rewire: Callable, tools: SimpleNamespace, formula: Callable, variant: str
) -> None:
    attached = attach(formula.__name__, build(variant).double())
    tools.shake(attached)
    weights, images = attached.state(), tools.images().double()
    untouched = build(variant).double()
    before = untouched(images)
    expected = rewire(untouched, lambda *args: formula(weights, *args))(images)
    assert torch.allclose(attached.model(images), expected, rtol=0, atol=1e-10)
    assert (expected - before).abs().max() > 1e-3


def test_reduction_divides_the_width_of_every_block(build: Build, attach: Attach) -> None:
    state = attach("pfeiffer", build("swin"), reduction=4).state()
    sizes = {value.shape for name, value in state.items() if name.endswith("down.weight")}
    assert sizes == {(4, 16), (8, 32)}


def test_dropped_paths_leave_out_whole_images_and_scale_the_rest(build: Build, attach: Attach) -> None:
    attached = attach("adapter_plus", build("plain"), drop_path=0.5)
    adapter = attached.model.blocks[0].remap_adapter_plus
    nn.init.normal_(adapter.up.weight)
    x = torch.randn(64, 3, 32)
    whole = adapter.eval()(x)
    attached.train()
    attached.set_sample_keys(torch.arange(64) * 7919)
    found = adapter(x)
    kept = found.flatten(1).abs().sum(1) > 0
    assert 16 < kept.sum() < 48
    assert torch.allclose(found[kept], 2 * whole[kept])
    assert torch.equal(found, adapter(x)), "the key decides"


def test_adapter_plus_sees_the_prompts_whichever_is_attached_first(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    """The adapter is part of the block: it acts before the prompts are cut from the block's output."""
    outputs = []
    for name in ("vpt_shallow+adapter_plus", "adapter_plus+vpt_shallow"):
        attached = attach(name, build("plain"))
        generator = torch.Generator().manual_seed(5)
        parameters = tools.trained(attached)
        with torch.no_grad():
            for key in sorted(parameters):
                parameters[key].copy_(0.2 * torch.randn(parameters[key].shape, generator=generator))
        outputs.append(attached.model(tools.images()))
    assert torch.equal(*outputs)


# Per block 2*768*r + r + 768 a site; Adapter+ has a scale of 768 more.
@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("houlsby", {}, 313_536),
        ("pfeiffer", {}, 156_768),
        ("pfeiffer", {"bottleneck": 96}, 1_779_840),
        ("pfeiffer", {"reduction": 8}, 1_779_840),
        ("pfeiffer", {"reduction": 256}, 64_548),
        ("adapter_plus", {}, 165_984),
        ("adapter_plus", {"bottleneck": 16}, 313_536),
    ],
)
def test_trainable_parameters_on_vit_b16(method: str, options: dict, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
        attached = attach_method(model, anatomy_of(model), method, options)
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == count
