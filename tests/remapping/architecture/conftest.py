"""Tiny teachers made by timm, with every parameter away from its initial 0 or 1. Random, offline, on the CPU."""

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import Backbone, Identity
from remap.backbones.preprocess import PreprocessSpec

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
TEACHERS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),  # LayerScale, positions for patches alone
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "no_class": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "clip": ("vit_base_patch16_clip_224", {}),  # a norm in front of the blocks
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "inner_norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "gated": ("vit_giant_patch14_dinov2", {}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "swin": ("swin_tiny_patch4_window7_224", {}),
}


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """A function from a teacher's name to a model, in eval."""

    def made(name: str, **options: object) -> nn.Module:
        torch.manual_seed(0)
        architecture, own = TEACHERS[name]
        shape = {"img_size": 32, "window_size": 4} if name == "swin" else SHAPE
        model = timm.create_model(architecture, **{**shape, **own, "num_classes": 5, **options})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return made


@pytest.fixture
def as_teacher() -> Callable[[nn.Module], Backbone]:
    def wrapped(model: nn.Module) -> Backbone:
        return Backbone(model, anatomy_of(model), PreprocessSpec.of(model), Identity("tiny", "none", ""), True)

    return wrapped


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def batches(images: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(images.split(4))
