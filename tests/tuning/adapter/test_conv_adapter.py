"""Conv-Adapter against its formula."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.tuning.attached import Attached


def test_output_is_the_sum_of_the_paper(
    build: Callable[[str], nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    """Source: sums over channels and groups, written out in float64, for a strided convolution."""
    model = build("resnet_bottleneck").double()
    layer = model.get_submodule("layer2.0.conv2")
    attached = attach("conv_adapter", model, reduction=3)
    tools.shake(attached)
    adapter = model.get_submodule("layer2.0.remap_conv_adapter_conv2")
    x = torch.randn(2, layer.in_channels, 6, 6, dtype=torch.float64)
    r = adapter.down.out_channels
    assert layer.stride == (2, 2) and layer.in_channels % r == 0 and r <= layer.in_channels / 3
    share = layer.in_channels // r
    hidden = torch.stack(
        [
            F.conv2d(x[:, n * share : (n + 1) * share], adapter.down.weight[n : n + 1], stride=2, padding=1)[:, 0]
            for n in range(r)
        ],
        dim=1,
    ).clamp_min(0)
    change = torch.einsum("or,brhw->bohw", adapter.up.weight[:, :, 0, 0], hidden) * adapter.scale
    plain = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
    assert isinstance(change, Tensor) and change.abs().max() > 0.01
    assert torch.allclose(layer(x), plain + change, atol=1e-12)


def test_starts_at_the_backbone(
    build: Callable[[str], nn.Module], attach: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    model, images = build("convnext"), tools.images()
    before = model(images)
    attach("conv_adapter", model)
    assert torch.equal(model(images), before)
