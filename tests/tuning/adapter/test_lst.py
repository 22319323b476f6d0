"""Ladder side-tuning against its formula, in float64 on whole tiny models.

Source: Sung et al. 2022 (2206.06522) section 3.2, and Dosovitskiy et al. 2020 (2010.11929) equations 2 and 3 for the
side blocks. The ladder's rungs come from an untouched timm model; all else is written out.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning.adapter.lst import num_heads
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Weights = dict[str, Tensor]

# What the classifier of each reads: token 0, tokens 0 and 1 (one each), or the mean of the patches behind a prefix.
POOL = {
    **dict.fromkeys(("plain", "dinov2_registers", "clip"), [lambda s: s[:, 0]]),
    "deit_distilled": [lambda s: s[:, 0], lambda s: s[:, 1]],
    "siglip": [lambda s: s.mean(1)],
    **dict.fromkeys(("avg_pool", "eva02", "beit"), [lambda s: s[:, 1:].mean(1)]),
    "dinov3": [lambda s: s[:, 5:].mean(1)],
}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"remap_lst.{name}.weight"].T + w[f"remap_lst.{name}.bias"]


def standard(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return standard(x) * w[f"remap_lst.{name}.weight"] + w[f"remap_lst.{name}.bias"]


def side_block(w: Weights, at: str, x: Tensor, heads: int) -> Tensor:
    q, k, v = linear(w, f"{at}.qkv", norm(w, f"{at}.norm1", x)).chunk(3, -1)
    out = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = torch.exp(q_h @ k_h.mT / math.sqrt(q_h.shape[-1]))
        out.append(scores / scores.sum(-1, keepdim=True) @ v_h)
    x = x + linear(w, f"{at}.proj", torch.cat(out, -1))
    hidden = linear(w, f"{at}.fc1", norm(w, f"{at}.norm2", x))
    return x + linear(w, f"{at}.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def rungs(base: nn.Module, images: Tensor) -> list[Tensor]:
    """The input of the first block and the outputs of all blocks."""
    seen: list[Tensor] = []
    handles = [base.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    handles += [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in base.blocks]
    base(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("gates", ["fixed", "learned"])
@pytest.mark.parametrize("variant", POOL)
def test_whole_model_equals_the_formula(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, gates: str
) -> None:
    attached = attach("lst", build(variant).double(), reduction=2, gates=gates)
    tools.shake(attached)
    w, base, images = attached.model.state_dict(), build(variant).double(), tools.images().double()
    h = rungs(base, images)
    side = linear(w, "downs.0", h[0])
    for index in range(3):
        alpha = w["remap_lst.gates"][index] if gates == "learned" else torch.zeros(()).double()
        gate = 1 / (1 + torch.exp(-alpha / 0.1))
        side = gate * linear(w, f"downs.{index + 1}", h[index + 1]) + (1 - gate) * side
        side = side_block(w, f"blocks.{index}", side, heads=1)  # width 16: one head, as wide as the backbone's
    logits = [
        linear(w, "up", standard(pool(side))) @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        for pool, name in zip(POOL[variant], ("head", "head_dist"), strict=False)
    ]
    assert torch.allclose(attached.model(images), sum(logits) / len(logits), rtol=0, atol=1e-10)


def test_learned_gates_start_as_the_fixed_ones(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    fixed, learned = (attach("lst", build("plain"), gates=gates) for gates in ("fixed", "learned"))
    assert torch.equal(fixed.model(tools.images()), learned.model(tools.images()))
    assert set(learned.trainable) - set(fixed.trainable) == {"remap_lst.gates"} <= set(learned.no_decay)


# V-PETL Bench counts 2.38 M at reduction 8.
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2_376_288),
        ({"gates": "learned"}, 2_376_288 + 12),
        ({"reduction": 4}, 7_406_016),
        ({"reduction": 16}, 856_752),
    ],
)
def test_counts_on_vit_b16(options: dict, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    attached = attach_method(model, anatomy_of(model), "lst", options)
    parameters = dict(model.named_parameters())
    d = 768 // options.get("reduction", 8)
    formula = 12 * (12 * d * d + 13 * d) + 13 * (768 * d + d) + d * 768 + 768 + 12 * ("gates" in options)
    assert sum(parameters[name].numel() for name in attached.trainable) == formula
    assert count == formula


def test_no_gradient_enters_the_backbone(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    """The rungs are leaves of the graph: no activation of the backbone is kept for a backward pass through it."""
    attached = attach("lst", build("plain"))
    seen: list[Tensor] = []
    attached.model.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
    assert attached.model(tools.images()).requires_grad
    assert not seen[0].requires_grad


@pytest.mark.parametrize(
    ("width", "head_dim", "heads"), [(96, 64, 2), (48, 64, 1), (128, 64, 2), (24, 8, 3), (7, 64, 1), (36, 15, 3)]
)
def test_heads_are_about_as_wide_as_the_backbones(width: int, head_dim: int, heads: int) -> None:
    """96 = 2 * 48, nearer to 64 than 1 * 96; of 36 = 2 * 18 = 3 * 12, equally far from 15, the more heads."""
    assert num_heads(width, head_dim) == heads


def test_a_side_network_without_width_is_refused(build: Build, attach: Attach) -> None:
    with pytest.raises(BackboneError, match="no width"):
        attach("lst", build("plain"), reduction=33)


def test_features_that_were_not_seen_are_an_error(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    attached = attach("lst", build("plain"))
    features = attached.model.forward_features(tools.images())
    assert attached.model.forward_head(features).shape == (2, 5)
    with pytest.raises(BackboneError, match="has not seen"):
        attached.model.forward_head(features)
