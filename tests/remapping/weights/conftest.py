"""Tiny pairs of sequence models for weight remapping: timm's own names with their options, in float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.remapping.weights import INITS
from remap.remapping.weights.base import Report, remap_weights

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
LS = {**SHAPE, "init_values": 0.3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SHAPE),
    "vit_dinov2": ("vit_small_patch14_reg4_dinov2", LS),
    "vit_swiglu": ("vit_giant_patch14_dinov2", {**SHAPE, "mlp_ratio": 4.0}),
    "vit_distilled": ("deit_tiny_distilled_patch16_224", SHAPE),
    "vit_deit3": ("deit3_small_patch16_224", LS),
    "vit_siglip": ("vit_base_patch16_siglip_224", SHAPE),
    "vit_clip": ("vit_base_patch32_clip_224", SHAPE),
    "vit_avg": ("vit_tiny_patch16_224", {**SHAPE, "global_pool": "avg", "qk_norm": True}),
    "vit_inner_norms": ("beit3_base_patch16_224", SHAPE),
    "eva02_fused": ("eva02_tiny_patch14_224", SHAPE),
    "eva02_split": ("eva02_base_patch14_224", SHAPE),
    "eva02_clip": ("eva02_base_patch16_clip_224", SHAPE),
    "eva_no_rope": ("eva_giant_patch14_224", SHAPE),
    "dinov3": ("vit_small_patch16_dinov3", LS),
    "dinov3_bias": ("vit_small_patch16_dinov3_qkvb", LS),
    "dinov3_swiglu": ("vit_small_plus_patch16_dinov3", LS),
    "rope": ("vit_small_patch16_rope_224", SHAPE),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", SHAPE),
    "pe_core": ("vit_pe_core_tiny_patch16_384", SHAPE),
    "beit": ("beit_base_patch16_224", LS),
    "beit_shared": ("beitv2_base_patch16_224", {**LS, "use_shared_rel_pos_bias": True, "qkv_bias": False}),
    "beit_absolute": ("beit_base_patch16_224", {**LS, "use_abs_pos_emb": True, "global_pool": "token"}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    "resnet": ("resnet18", {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}),
}
SEQUENCES = [name for name in VARIANTS if name not in ("swin", "resnet")]

Build = Callable[..., SimpleNamespace]


def build_model(variant: str, seed: int = 0, **changes: Any) -> SimpleNamespace:
    """A model with its anatomy, in eval mode, every parameter away from 0 and 1."""
    name, options = VARIANTS[variant]
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=4, **{**options, **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SimpleNamespace(model=model, anatomy=anatomy_of(model))


def run_init(
    name: str, teacher: SimpleNamespace, student: SimpleNamespace, sample: Any = None, **options: Any
) -> Report:
    cls = INITS.load(name)
    return remap_weights(cls(cls.Config(**options)), teacher, student, sample)


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


@pytest.fixture
def build() -> Build:
    return build_model


@pytest.fixture
def initialise() -> Callable[..., Report]:
    return run_init


@pytest.fixture
def features() -> Callable[[nn.Module, Tensor], Tensor]:
    """What enters the classifier."""
    return pooled


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SEQUENCES)
def sequence(request: pytest.FixtureRequest) -> str:
    return request.param
