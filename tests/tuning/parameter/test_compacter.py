"""Compacter against Houlsby's adapters with weights made by ``torch.kron``, in float64 on whole tiny models.

Source: Mahabadi et al. 2021 (2106.04647). Houlsby's adapters have a reference of their own in
``adapter/test_sequential.py``.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def dense(state: dict[str, Tensor], layer: str) -> Tensor:
    """sum_k A_k (x) (s_k t_k^T)"""
    left, right = state[f"remap_compacter.{layer}.left"], state[f"remap_compacter.{layer}.right"]
    factors = zip(state["remap_compacter.shared"], left, right, strict=True)
    return sum(torch.kron(a, torch.outer(s, t)) for a, s, t in factors)


@pytest.mark.parametrize("variant", ["dinov2_registers", "eva02", "beit", "swin"])
@pytest.mark.parametrize("options", [{"bottleneck": 8}, {"bottleneck": 6, "num_factors": 2}])
def test_whole_model_equals_dense_bottlenecks(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, options: dict[str, int]
) -> None:
    attached = attach("compacter", build(variant).double(), **options)
    tools.shake(attached)
    state, images = attached.state(), tools.images().double()
    houlsby = attach("houlsby", build(variant).double(), bottleneck=options["bottleneck"])
    weights = {}
    for index, block in enumerate(houlsby.anatomy.blocks):
        for offset, word in enumerate(("attn", "mlp")):
            for part in ("down", "up"):
                ours, theirs = f"{part}.{2 * index + offset}", f"{block.block}.remap_houlsby_{word}.{part}"
                weights[f"{theirs}.weight"] = dense(state, ours)
                weights[f"{theirs}.bias"] = state[f"remap_compacter.{ours}.bias"]
    houlsby.load(weights)
    expected = houlsby.model(images)
    assert torch.allclose(attached.model(images), expected, rtol=0, atol=1e-10)
    assert (expected - build(variant).double()(images)).abs().max() > 1e-3


def test_down_projections_start_with_xaviers_variance(build: Build, attach: Attach) -> None:
    """2 / (D + r), on the average of many weights: one has few independent factors."""
    attached = attach("compacter", build("plain"), bottleneck=32, num_factors=16)
    state = attached.state()
    squares = torch.stack([dense(state, f"down.{index}").square().mean() for index in range(6)])
    assert 0.5 < squares.mean() * (32 + 32) / 2 < 2.0
    assert not any(dense(state, f"up.{index}").any() for index in range(6))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bottleneck": 10}, ValueError, "must be a multiple of num_factors"),
        ({"bottleneck": 12, "num_factors": 3}, BackboneError, "num_factors must divide"),
    ],
)
def test_factors_must_divide_bottleneck_and_width(
    build: Build, attach: Attach, options: dict[str, int], error: type[Exception], says: str
) -> None:
    model = build("plain")
    with pytest.raises(error, match=says):
        attach("compacter", model, **options)
    assert not [name for name in model.state_dict() if "remap_" in name]


# 4**3 + 24 * (2 * (768 + r) + r + 768).
@pytest.mark.parametrize(("options", "count"), [({}, 57_088), ({"bottleneck": 64}, 59_968)])
def test_trainable_parameters_on_vit_b16(options: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
        attached = attach_method(model, anatomy_of(model), "compacter", options)
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in attached.trainable) == count
