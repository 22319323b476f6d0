"""The border that is added to the image, against the untouched network on the sum."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import BackboneError
from remap.tuning import METHODS
from remap.tuning.attached import Attached
from remap.tuning.attaching import attach_method

Build = Callable[..., nn.Module]

ONE_OF_EACH = ["plain", "naflexvit", "dinov3", "beit", "swin", "convnext", "resnet"]


@pytest.fixture
def attach_vp(build: Build) -> Callable[..., Attached]:
    def make(variant: str, **options: object) -> Attached:
        model = build(variant).double()
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return attach_method(model, anatomy_of(model), "vp", options)

    return make


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_the_network_sees_the_image_plus_the_border(
    build: Build, attach_vp: Callable[..., Attached], tools: SimpleNamespace, variant: str
) -> None:
    """32 pixels: a border of 32 * 30 / 224 = 4.3, so 4."""
    attached = attach_vp(variant)
    tools.shake(attached)
    rows, columns = (attached.state()[f"remap_vp.{name}"] for name in ("rows", "columns"))
    assert rows.shape == (1, 3, 8, 32)
    assert columns.shape == (1, 3, 24, 8)
    changed = tools.images().double()
    changed[:, :, :4] += rows[:, :, :4]
    changed[:, :, -4:] += rows[:, :, 4:]
    changed[:, :, 4:-4, :4] += columns[..., :4]
    changed[:, :, 4:-4, -4:] += columns[..., 4:]
    base, images = build(variant).double(), tools.images().double()
    assert torch.allclose(attached.model(images), base(changed), rtol=0, atol=1e-10)
    assert torch.allclose(attached.model.forward_features(images), base.forward_features(changed), rtol=0, atol=1e-10)
    assert not torch.allclose(base(images), base(changed), rtol=0, atol=1e-5)


def test_init_std_scales_the_start_and_zero_is_the_identity(
    build: Build, attach_vp: Callable[..., Attached], tools: SimpleNamespace
) -> None:
    values = torch.cat([value.flatten() for value in attach_vp("plain", init_std=0.5, border=10).state().values()])
    assert abs(values.std() - 0.5) < 0.03
    plain = attach_vp("plain", init_std=0.0)
    images = tools.images().double()
    assert plain.identity_at_init
    assert torch.equal(plain.model(images), build("plain").double()(images))
    assert not attach_vp("plain").identity_at_init


@pytest.mark.parametrize("border", [16, 100])
def test_a_border_without_an_inside_is_refused(attach_vp: Callable[..., Attached], border: int) -> None:
    with pytest.raises(BackboneError, match="covers the whole image"):
        attach_vp("plain", border=border)


@pytest.mark.parametrize("backbone", ["vit_base_patch16_224", "resnet50", "swin_base_patch4_window7_224", "tresnet_m"])
def test_trained_parameters(count_on_meta: Callable[..., int], backbone: str) -> None:
    """2*C*b*(H + W - 2b) at b = 30 and 224 pixels, the paper's 69,840."""
    assert count_on_meta(backbone, "vp", {}) == 2 * 3 * 30 * (224 + 224 - 60) == METHODS.row("vp").vit_base
