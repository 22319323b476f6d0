"""Residual adapters against their formulas, and their folding, in float64 on whole tiny convolutional networks.

Sources: Rebuffi et al. 2017 (1705.08045) and 2018 (1803.10082). The frozen parts are an untouched timm model's, the
1x1 convolutions are products of a group's channels.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]
Weights = dict[str, Tensor]

RES = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 5}
SPATIAL = {
    "resnet": ("conv1", "conv2"),
    "resnet_bottleneck": ("conv2",),
    "resnext": ("conv2",),
    "convnext": ("conv_dw",),
}


def tiny(build: Build, name: str) -> nn.Module:
    """In float64, with batch norms whose statistics are no longer 0 and 1."""
    torch.manual_seed(4)
    model = ResNet(Bottleneck, **RES, cardinality=4, base_width=32, zero_init_last=False)
    model = (model if name == "resnext" else build(name)).double().eval()
    shake_statistics(dict(model.named_buffers()))
    return model


def shake_statistics(buffers: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(9)
    for name, buffer in buffers.items():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def one_by_one(weight: Tensor, x: Tensor) -> Tensor:
    """(o, i/G, 1, 1) on (B, i, H, W), a product for every group."""
    groups = x.shape[1] // weight.shape[1]
    parts = zip(weight[:, :, 0, 0].chunk(groups), x.chunk(groups, 1), strict=True)
    return torch.cat([torch.einsum("oi,bihw->bohw", w, part) for w, part in parts], 1)


def adapted(w: Weights, at: str, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What replaces conv(x)."""
    y = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if f"{at}.norm.running_mean" not in w:
        return y + one_by_one(w[f"{at}.conv.weight"], x[:, :, :: conv.stride[0], :: conv.stride[1]])
    mean, variance = (w[f"{at}.norm.running_{word}"][:, None, None] for word in ("mean", "var"))
    return y + one_by_one(w[f"{at}.conv.weight"], (y - mean) / (variance + 1e-5).sqrt())


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize("place", ["parallel", "series"])
@pytest.mark.parametrize("dense", [False, True])
def test_whole_model_equals_the_formula_and_folds(
    build: Build, tools: SimpleNamespace, name: str, place: str, dense: bool
) -> None:
    model = tiny(build, name)
    before = model(tools.images().double())
    attached = attach_method(model, anatomy_of(model), "residual_adapter", {"place": place, "dense": dense})
    assert torch.equal(model(tools.images().double()), before)
    tools.shake(attached)
    shake_statistics({key: value for key, value in model.named_buffers() if key in attached.buffers})
    state, images = attached.state(), tools.images().double()

    reference = tiny(build, name)
    reference.load_state_dict({key: value for key, value in state.items() if "remap_" not in key}, strict=False)
    sites = [path for path, _ in reference.named_modules() if path.rpartition(".")[2] in SPATIAL[name] and "." in path]
    assert len(sites) == 4 * len(SPATIAL[name])
    for path in sites:
        parent, _, word = path.rpartition(".")
        conv = reference.get_submodule(path)
        conv.forward = partial(adapted, state, f"{parent}.remap_residual_adapter_{word}", conv)
    expected = reference(images)
    assert torch.allclose(model(images), expected, rtol=0, atol=1e-9)
    assert (expected - before).abs().max() > 1e-3

    assert attached.mergeable == (not dense or name in ("resnet", "resnet_bottleneck"))
    if attached.mergeable:
        plain = tiny(build, name)
        plain.load_state_dict(attached.merge().state_dict())
        assert torch.allclose(plain(images), expected, rtol=0, atol=1e-9)


def test_series_without_a_place_for_the_shift_is_not_mergeable(tools: SimpleNamespace) -> None:
    """A group norm has no running mean that could take it, and these convolutions have no bias."""
    mergeable = {}
    for place in ("parallel", "series"):
        model = ResNet(Bottleneck, **RES, norm_layer=lambda channels, **options: nn.GroupNorm(4, channels)).eval()
        attached = attach_method(model, anatomy_of(model), "residual_adapter", {"place": place})
        tools.step(attached)
        mergeable[place] = attached.mergeable
        if attached.mergeable:
            tuned = model(tools.images())
            assert torch.allclose(attached.merge()(tools.images()), tuned, atol=1e-5)
    assert mergeable == {"parallel": True, "series": False}


def test_statistics_follow_the_images_behind_adapted_convolutions_only(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    attached = attach("residual_adapter", build("resnet_bottleneck"))
    before = {name: value.clone() for name, value in attached.model.state_dict().items()}
    tools.step(attached)
    moved = {
        name.rpartition(".")[0]
        for name, value in attached.model.state_dict().items()
        if "running" in name and not torch.equal(value, before[name])
    }
    assert moved == {f"layer{stage}.0.bn2" for stage in (1, 2, 3, 4)}
    assert {name for name in attached.buffers if "running" in name} == {
        f"{norm}.running_{word}" for norm in moved for word in ("mean", "var")
    }


# By hand from the architectures: a 1x1 convolution of the same channels as every 3x3 (or, for ConvNeXt, a scale for
# every depthwise 7x7), and two values a channel for the norm behind it.
RESNET18 = {(64, 64): 4, (64, 128): 1, (128, 128): 3, (128, 256): 1, (256, 256): 3, (256, 512): 1, (512, 512): 3}
RESNET50 = {(64, 64): 3, (128, 128): 4, (256, 256): 6, (512, 512): 3}
CONVNEXT_T = {(1, 96): 3, (1, 192): 3, (1, 384): 9, (1, 768): 3}


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("resnet18", RESNET18), ("resnet50", RESNET50), ("convnext_tiny", CONVNEXT_T)],
)
def test_trainable_parameters(name: str, convolutions: dict[tuple[int, int], int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    # The convolutional families ask timm's configuration for the image size.
    attached = attach_method(model, anatomy_of(model), "residual_adapter", {})
    parameters = dict(model.named_parameters())
    expected = sum(number * (i * o + 2 * o) for (i, o), number in convolutions.items())
    assert sum(parameters[key].numel() for key in attached.trainable) == expected
