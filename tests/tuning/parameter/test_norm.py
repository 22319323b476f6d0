"""Which norms train. Expected names come from the types of the modules, or are written out."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


@pytest.mark.parametrize("variant", ["plain", "siglip", "clip", "eva02_separate", "swin", "convnext", "resnet"])
def test_every_norm_trains_and_nothing_else(build: Build, attach: Attach, variant: str) -> None:
    model = build(variant)
    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    paths = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    expected = {f"{path}.{name}" for path in paths for name in ("weight", "bias")}
    assert set(attach("norm", model).trainable) == expected


def test_norms_of_queries_and_keys(build: Build, attach: Attach) -> None:
    """All but the keys' bias, a shift that softmax does not see."""
    inside = [name for name in attach("norm", build("avg_pool")).trainable if name.startswith("blocks.1.attn")]
    assert set(inside) == {f"blocks.1.attn.{name}" for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight")}


def test_only_those_in_blocks(build: Build, attach: Attach) -> None:
    names = attach("norm", build("clip"), where="blocks").trainable
    inside = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}
    assert set(names) == {f"blocks.{i}.{name}" for i in range(3) for name in inside}


def test_response_norms_train_without_the_mlp_that_holds_them() -> None:
    """ConvNeXt V2: timm's GlobalResponseNormMlp is no norm, its ``grn`` is one."""
    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), use_grn=True, ls_init_value=None, num_classes=5)
    names = attach_method(model, anatomy_of(model), "norm", {}).trainable
    inside = [name for name in names if name.startswith("stages.0.blocks.0.mlp")]
    assert inside == ["stages.0.blocks.0.mlp.grn.weight", "stages.0.blocks.0.mlp.grn.bias"]


def test_rms_norms_have_a_weight_only() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**options, norm_layer="rmsnorm")
    names = attach_method(model, anatomy_of(model), "norm", {}).trainable
    assert list(names) == ["blocks.0.norm1.weight", "blocks.0.norm2.weight", "norm.weight"]


def test_running_statistics_stay(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    model, base = build("resnet"), build("resnet")
    tools.step(attach("norm", model))
    assert torch.equal(model.bn1.running_mean, base.bn1.running_mean)
    assert not torch.equal(model.bn1.weight, base.bn1.weight)


def test_count(count: Callable[..., int]) -> None:
    assert count("norm") == 25 * 2 * 768 == 38_400
    assert count("norm", where="blocks") == 36_864
