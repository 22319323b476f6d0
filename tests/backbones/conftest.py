"""Tiny models of every family and variant: timm's own names with their options, at a tiny size."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

# depth is 3, the grid 4 x 4 for sequence models; every model has four classes.
SEQUENCE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
RESNET = {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}

TINY: dict[str, tuple[str, dict]] = {
    "vit": ("vit_tiny_patch16_224", SEQUENCE),
    "vit_dinov2": ("vit_small_patch14_reg4_dinov2", {**SEQUENCE, "init_values": 0.3}),
    "vit_swiglu": ("vit_giant_patch14_dinov2", SEQUENCE),
    "vit_distilled": ("deit_tiny_distilled_patch16_224", SEQUENCE),
    "vit_deit3": ("deit3_small_patch16_224", {**SEQUENCE, "init_values": 0.3, "drop_path_rate": 0.3}),
    "vit_siglip": ("vit_base_patch16_siglip_224", SEQUENCE),
    "vit_clip": ("vit_base_patch32_clip_224", SEQUENCE),
    "vit_avg": ("vit_tiny_patch16_224", {**SEQUENCE, "global_pool": "avg", "qk_norm": True}),
    "vit_no_class": (
        "vit_tiny_patch16_224",
        {**SEQUENCE, "class_token": False, "global_pool": "avg", "reg_tokens": 2},
    ),
    "vit_inner_norms": ("beit3_base_patch16_224", SEQUENCE),
    "eva02_fused": ("eva02_tiny_patch14_224", SEQUENCE),
    "eva02_split": ("eva02_base_patch14_224", SEQUENCE),
    "eva02_clip": ("eva02_base_patch16_clip_224", SEQUENCE),
    "eva_no_rope": ("eva_giant_patch14_224", SEQUENCE),
    "dinov3": ("vit_small_patch16_dinov3", {**SEQUENCE, "init_values": 0.3}),
    "dinov3_bias": ("vit_small_patch16_dinov3_qkvb", {**SEQUENCE, "init_values": 0.3}),
    "dinov3_swiglu": ("vit_small_plus_patch16_dinov3", {**SEQUENCE, "init_values": 0.3, "drop_path_rate": 0.3}),
    "rope": ("vit_small_patch16_rope_224", SEQUENCE),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", SEQUENCE),
    "pe_core": ("vit_pe_core_tiny_patch16_384", SEQUENCE),
    "beit": ("beit_base_patch16_224", {**SEQUENCE, "init_values": 0.3}),
    "beit_shared": ("beitv2_base_patch16_224", {**SEQUENCE, "use_shared_rel_pos_bias": True, "qkv_bias": False}),
    "beit_shared_only": (
        "beit_base_patch16_224",
        {**SEQUENCE, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "beit_absolute": ("beit_base_patch16_224", {**SEQUENCE, "use_abs_pos_emb": True, "global_pool": "token"}),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "drop_path_rate": 0.3}),
    "convnext": ("convnext_tiny", {**CONVNEXT, "drop_path_rate": 0.3, "ls_init_value": 0.3}),
    "convnext_conv_mlp": ("convnext_atto", {**CONVNEXT, "ls_init_value": 0.3}),
    "convnext_norm_first": ("convnext_tiny_hnf", CONVNEXT),
    "convnext_v2": ("convnextv2_atto", CONVNEXT),
    "resnet_basic": ("resnet18", RESNET),
    "resnet_bottleneck": ("resnet50", RESNET),
    "resnet_deep_stem": ("resnet50d", {**RESNET, "drop_path_rate": 0.3}),
    "resnet_se": ("seresnet50", RESNET),
    "resnext": ("resnext50_32x4d", {**RESNET, "cardinality": 4, "base_width": 32}),
}


def build_tiny(name: str, seed: int = 0) -> nn.Module:
    """In eval mode, float64, with every parameter and running statistic away from 0 and 1."""
    timm_name, options = TINY[name]
    size = 64 if name.startswith(("convnext", "resn")) else 32
    torch.manual_seed(seed)
    overlay = {"input_size": (3, size, size)}
    model = timm.create_model(timm_name, num_classes=4, pretrained_cfg_overlay=overlay, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if "running" in key:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    return build_tiny


@pytest.fixture(params=TINY)
def tiny_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name, (_, options) in TINY.items() if "depth" in options])
def sequence_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name, (_, options) in TINY.items() if "num_heads" not in options])
def convolutional_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name, (_, options) in TINY.items() if "num_heads" in options])
def attention_name(request: pytest.FixtureRequest) -> str:
    return request.param
