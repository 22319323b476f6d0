"""The border that enlarges the image, against the untouched network on the enlarged image."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]

CONV = ["convnext", "resnet", "resnet_bottleneck"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def attach_pad(build: Build) -> Callable[..., Attached]:
    def make(variant: str, border: int = 2) -> Attached:
        model = build(variant).double()
        model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}
        return attach_method(model, anatomy_of(model), "vpt_pad", {"border": border})

    return make


@pytest.mark.parametrize("variant", CONV)
def test_the_network_sees_the_image_inside_the_normalised_border(
    build: Build, attach_pad: Callable[..., Attached], tools: SimpleNamespace, variant: str
) -> None:
    attached = attach_pad(variant)
    tools.shake(attached)
    rows, columns = (attached.state()[f"remap_vpt_pad.{name}"] for name in ("rows", "columns"))
    assert rows.shape == (1, 3, 4, 36)
    assert columns.shape == (1, 3, 32, 4)
    canvas = torch.zeros(2, 3, 36, 36, dtype=torch.float64)
    canvas[:, :, :2], canvas[:, :, -2:] = rows[:, :, :2], rows[:, :, 2:]
    canvas[:, :, 2:-2, :2], canvas[:, :, 2:-2, -2:] = columns[..., :2], columns[..., 2:]
    for channel in range(3):
        canvas[:, channel] = (canvas[:, channel] - MEAN[channel]) / STD[channel]
    images = tools.images().double()
    canvas[:, :, 2:-2, 2:-2] = images
    base = build(variant).double()
    assert torch.allclose(attached.model(images), base(canvas), rtol=0, atol=1e-10)
    assert torch.allclose(attached.model.forward_features(images), base.forward_features(canvas), rtol=0, atol=1e-10)


def test_the_border_starts_uniform_in_pixels(attach_pad: Callable[..., Attached]) -> None:
    """U(0, 1): mean 1/2, standard deviation 1 / sqrt(12)."""
    values = torch.cat([value.flatten() for value in attach_pad("resnet", border=15).state().values()])
    assert 0.0 <= values.min() < 0.01
    assert 0.99 < values.max() <= 1.0
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.std() - 12**-0.5) < 0.01


def test_another_image_size_is_refused(attach_pad: Callable[..., Attached]) -> None:
    with pytest.raises(BackboneError, match="another image size"):
        attach_pad("resnet").model(torch.zeros(1, 3, 40, 40, dtype=torch.float64))


@pytest.mark.parametrize(("border", "count"), [(5, 13_740), (30, 91_440)])
@pytest.mark.parametrize("backbone", ["convnext_base", "resnet50"])
def test_trained_parameters(count_on_meta: Callable[..., int], backbone: str, border: int, count: int) -> None:
    """12*b*(224 + b): VPT's own count for its convolutional networks."""
    assert count_on_meta(backbone, "vpt_pad", {"border": border}) == count == 12 * border * (224 + border)
