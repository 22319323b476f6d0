"""Pixels to model input: each network's own size, interpolation and normalisation from one raw batch."""

import numpy as np
import pytest
import timm
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.backbones.typed import input_channels


def _spec(**kwargs: object) -> PreprocessSpec:
    values = {"size": 8, "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)}
    return PreprocessSpec(**{**values, **kwargs})


def test_normalisation_by_hand() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = images.numpy().astype(np.float64) / 255.0
    wanted = (wanted - np.array([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)) / np.array([0.5, 0.4, 0.3]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(Preprocess(_spec())(images).numpy(), wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("mode", "tv_mode"), [("bicubic", InterpolationMode.BICUBIC), ("bilinear", InterpolationMode.BILINEAR)]
)
def test_resizing_is_torchvisions_antialiased_one(mode: str, tv_mode: InterpolationMode) -> None:
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain = _spec(interpolation=mode, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    wanted = tv.resize(images.float(), [8, 8], tv_mode, antialias=True).clamp(0, 255) / 255
    torch.testing.assert_close(Preprocess(plain)(images), wanted, atol=1e-6, rtol=0)


def test_the_spec_is_what_timm_states_of_the_weights() -> None:
    """Source: timm's configuration: AugReg weights use mean and std 0.5, CLIP's its own, DINOv2 ImageNet's at 518."""
    with torch.device("meta"):
        specs = {
            n: PreprocessSpec.of(timm.create_model(n))
            for n in ("vit_small_patch16_224.augreg_in21k", "vit_small_patch14_dinov2.lvd142m")
        }
    augreg, dino = specs.values()
    assert (augreg.size, augreg.mean, augreg.std, augreg.crop_pct) == (224, (0.5,) * 3, (0.5,) * 3, 0.9)
    assert (dino.size, dino.mean, dino.std) == (518, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert PreprocessSpec(**dino.to_dict()) == dino


@pytest.mark.parametrize(("channels", "seen"), [(1, 3), (3, 1), (4, 4)])
def test_channels_and_oblong_inputs_by_hand(channels: int, seen: int) -> None:
    """Greys are .299 R + .587 G + .114 B (ITU-R BT.601); a grey is all three colours."""
    mean, std = (tuple(np.arange(1, channels + 1) / scale) for scale in (10, 5))
    images = torch.randint(0, 256, (2, seen, 6, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = images.numpy().astype(np.float64) / 255
    pixels = np.einsum("bchw,c->bhw", pixels, [0.299, 0.587, 0.114])[:, None] if channels == 1 else pixels
    wanted = (pixels - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    spec = _spec(size=(6, 10), mean=mean, std=std)
    assert spec.shape == (channels, 6, 10) and PreprocessSpec(**spec.to_dict()) == spec
    np.testing.assert_allclose(Preprocess(spec)(images).numpy(), wanted, atol=5e-6)


@pytest.mark.parametrize("name", ["tresnet_m", "naflexvit_base_patch16_gap", "resnet18", "convnext_atto"])
def test_channels_are_those_of_the_image_also_where_pixels_are_rearranged_first(name: str) -> None:
    with torch.device("meta"):
        assert input_channels(timm.create_model(name)) == 3


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_channels_are_those_of_the_weights_whatever_the_configuration_says(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, in_chans=5)
    model.pretrained_cfg["input_size"] = (3, 224, 224)
    assert input_channels(model) == 5
