"""The tiny models of all tests: one row each, chosen by the suites that use it. Random, offline, on the CPU.

A new family of backbones gets a row with ``uses=ALL``; further rows are variants that one suite wants. Suites:
"anatomy" (tests/backbones), "methods" (tests/tuning), "signals", "weights" and "cut" (tests/remapping), "runs" (runs
on families other than plain vision transformers, from model folders).
"""

from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

ALL = ("anatomy", "methods", "runs")

# Sizes; a suite may change them. The grid of sequences is 4 x 4.
SEQUENCE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
NARROW = {**SEQUENCE, "mlp_ratio": 2.0}
SHALLOW = {**SEQUENCE, "depth": 2}
SCALED = {**SEQUENCE, "init_values": 0.3}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
TINY_VIT = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2), "window_sizes": (2,) * 4}
HIERA = {"img_size": 32, "embed_dim": 16, "stages": (1, 1, 2, 2), "mask_unit_size": (8, 8)}
RESNET = {"layers": (1, 2, 1, 1), "channels": (8, 16, 24, 32)}
RESNET_SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
SIGNALS = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
CUT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}


@dataclass(frozen=True)
class TinyModel:
    """One row.

    Attributes:
        name: Unique within each suite.
        make: A name of timm, whose other options hold, or a class.
        uses: The suites.
        each: Whether it stands for its family where a test takes long.
    """

    name: str
    family: str
    make: str | type[nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ALL
    each: bool = False

    def build(self, num_classes: int, **changes: Any) -> nn.Module:
        """Return the model with timm's own initialisation."""
        options = {**self.options, "num_classes": num_classes, **changes}
        return timm.create_model(self.make, **options) if isinstance(self.make, str) else self.make(**options)


TINY_MODELS = [
    # Plain vision transformers. Rates above 0 show whether frozen parts stay in eval.
    TinyModel(
        "plain", "vit", VisionTransformer, {**NARROW, "drop_path_rate": 0.3, "proj_drop_rate": 0.2}, ("methods",)
    ),
    TinyModel(
        "dinov2_registers",
        "vit",
        VisionTransformer,
        {**NARROW, "init_values": 0.1, "reg_tokens": 4, "no_embed_class": True, "patch_drop_rate": 0.5},
        ("methods",),
        each=True,
    ),
    TinyModel("deit_distilled", "vit", VisionTransformerDistilled, NARROW, ("methods",)),
    TinyModel("siglip", "vit", VisionTransformer, {**NARROW, "class_token": False, "global_pool": "map"}, ("methods",)),
    TinyModel("clip", "vit", VisionTransformer, {**NARROW, "pre_norm": True, "attn_drop_rate": 0.2}, ("methods",)),
    TinyModel(
        "avg_pool",
        "vit",
        VisionTransformer,
        {**NARROW, "global_pool": "avg", "qk_norm": True, "pos_drop_rate": 0.2},
        ("methods",),
    ),
    TinyModel("vit", "vit", "vit_tiny_patch16_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("vit_dinov2", "vit", "vit_small_patch14_reg4_dinov2", SCALED, ("anatomy", "weights")),
    TinyModel("vit_swiglu", "vit", "vit_giant_patch14_dinov2", {**SEQUENCE, "mlp_ratio": 4.0}, ("anatomy", "weights")),
    TinyModel("vit_distilled", "vit", "deit_tiny_distilled_patch16_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("vit_deit3", "vit", "deit3_small_patch16_224", {**SCALED, "drop_path_rate": 0.3}, ("anatomy", "weights")),
    TinyModel("vit_siglip", "vit", "vit_base_patch16_siglip_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("vit_clip", "vit", "vit_base_patch32_clip_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel(
        "vit_avg",
        "vit",
        "vit_tiny_patch16_224",
        {**SEQUENCE, "global_pool": "avg", "qk_norm": True},
        ("anatomy", "weights"),
    ),
    TinyModel(
        "vit_no_class",
        "vit",
        "vit_tiny_patch16_224",
        {**SEQUENCE, "class_token": False, "global_pool": "avg", "reg_tokens": 2},
        ("anatomy",),
    ),
    TinyModel("vit_inner_norms", "vit", "beit3_base_patch16_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("plain", "vit", VisionTransformer, SIGNALS, ("signals",)),
    TinyModel(
        "layerscale_registers", "vit", VisionTransformer, {**SIGNALS, "reg_tokens": 3, "init_values": 0.5}, ("signals",)
    ),
    TinyModel("qk_norm", "vit", VisionTransformer, {**SIGNALS, "qk_norm": True}, ("signals",)),
    TinyModel("distilled", "vit", VisionTransformerDistilled, SIGNALS, ("signals",)),
    TinyModel(
        "no_class", "vit", VisionTransformer, {**SIGNALS, "class_token": False, "global_pool": "avg"}, ("signals",)
    ),
    TinyModel(
        "no_class_registers",
        "vit",
        VisionTransformer,
        {**SIGNALS, "class_token": False, "global_pool": "avg", "reg_tokens": 2},
        ("signals",),
    ),
    TinyModel(
        "siglip", "vit", VisionTransformer, {**SIGNALS, "class_token": False, "global_pool": "map"}, ("signals",)
    ),
    TinyModel("plain", "vit", "vit_tiny_patch16_224", CUT, ("cut",)),
    TinyModel("registers", "vit", "vit_small_patch14_reg4_dinov2", CUT, ("cut",)),  # positions for patches alone
    TinyModel("distilled", "vit", "deit_tiny_distilled_patch16_224", CUT, ("cut",)),
    TinyModel("no_class", "vit", "vit_tiny_patch16_224", {**CUT, "class_token": False, "global_pool": "avg"}, ("cut",)),
    TinyModel("clip", "vit", "vit_base_patch16_clip_224", CUT, ("cut",)),  # a norm in front of the blocks
    TinyModel("qk_norm", "vit", "vit_tiny_patch16_224", {**CUT, "qk_norm": True}, ("cut",)),
    TinyModel(
        "inner_norms", "vit", "vit_tiny_patch16_224", {**CUT, "scale_attn_norm": True, "scale_mlp_norm": True}, ("cut",)
    ),
    TinyModel("siglip", "vit", "vit_base_patch16_siglip_224", CUT, ("cut",)),
    TinyModel("gated", "vit", "vit_giant_patch14_dinov2", CUT, ("cut",)),
    # A grid of positions larger than that of the images, which each forward resamples.
    TinyModel(
        "naflexvit",
        "naflexvit",
        "naflexvit_base_patch16_radio_v3",
        {**SEQUENCE, "reg_tokens": 3, "pos_embed_grid_size": (6, 6), "final_norm": True},
        each=True,
    ),
    # Rotary ones. eva02_tiny: fused q, k, v whose biases are tensors of their own; gated MLP.
    TinyModel(
        "eva02",
        "eva",
        Eva,
        {**NARROW, "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "pos_drop_rate": 0.2},
        ("methods",),
        each=True,
    ),
    # eva02_base: separate q, k, v; a norm inside the MLP.
    TinyModel(
        "eva02_separate",
        "eva",
        Eva,
        {**NARROW, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True},
        ("methods",),
    ),
    TinyModel(
        "dinov3",
        "eva",
        Eva,
        {
            **NARROW,
            "qkv_bias": False,
            "init_values": 0.1,
            "rope_type": "dinov3",
            "use_rot_pos_emb": True,
            "use_abs_pos_emb": False,
            "num_reg_tokens": 4,
            "use_fc_norm": False,
        },
        ("methods",),
    ),
    TinyModel("eva02_fused", "eva", "eva02_tiny_patch14_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("eva02_split", "eva", "eva02_base_patch14_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("eva02_clip", "eva", "eva02_base_patch16_clip_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("eva_no_rope", "eva", "eva_giant_patch14_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("dinov3", "eva", "vit_small_patch16_dinov3", SCALED, ("anatomy", "weights")),
    TinyModel("dinov3_bias", "eva", "vit_small_patch16_dinov3_qkvb", SCALED, ("anatomy", "weights")),
    TinyModel(
        "dinov3_swiglu",
        "eva",
        "vit_small_plus_patch16_dinov3",
        {**SCALED, "drop_path_rate": 0.3},
        ("anatomy", "weights"),
    ),
    TinyModel("rope", "eva", "vit_small_patch16_rope_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("rope_mixed", "eva", "vit_small_patch16_rope_mixed_224", SEQUENCE, ("anatomy", "weights")),
    TinyModel("pe_core", "eva", "vit_pe_core_tiny_patch16_384", SEQUENCE, ("anatomy", "weights")),
    TinyModel("eva02_fused", "eva", "eva02_tiny_patch14_224", SIGNALS, ("signals",)),
    TinyModel("eva02_split", "eva", "eva02_base_patch14_224", SIGNALS, ("signals",)),
    TinyModel("dinov3", "eva", "vit_small_patch16_dinov3", SIGNALS, ("signals",)),
    TinyModel("dinov3_bias", "eva", "vit_small_patch16_dinov3_qkvb", SIGNALS, ("signals",)),
    TinyModel("pe_core", "eva", "vit_pe_core_tiny_patch16_384", SIGNALS, ("signals",)),
    TinyModel("rope_mixed", "eva", "vit_small_patch16_rope_mixed_224", SIGNALS, ("signals",)),
    TinyModel("eva_no_rope", "eva", "eva_giant_patch14_224", SIGNALS, ("signals",)),
    TinyModel("eva", "eva", "eva02_tiny_patch14_224", CUT, ("cut",)),
    TinyModel("dinov3", "eva", "vit_small_patch16_dinov3", CUT, ("cut",)),
    TinyModel("mixed", "eva", "vit_small_patch16_rope_mixed_224", CUT, ("cut",)),
    TinyModel("eva", "eva", "eva02_tiny_patch14_224", SHALLOW, ("runs",)),
    # Relative position bias.
    TinyModel(
        "beit",
        "beit",
        Beit,
        {**NARROW, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, "drop_path_rate": 0.3},
        ("methods",),
        each=True,
    ),
    TinyModel("beit", "beit", "beit_base_patch16_224", SCALED, ("anatomy", "weights")),
    TinyModel(
        "beit_shared",
        "beit",
        "beitv2_base_patch16_224",
        {**SCALED, "use_shared_rel_pos_bias": True, "qkv_bias": False},
        ("anatomy", "weights"),
    ),
    TinyModel(
        "beit_shared_only",
        "beit",
        "beit_base_patch16_224",
        {**SEQUENCE, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        ("anatomy",),
    ),
    TinyModel(
        "beit_absolute",
        "beit",
        "beit_base_patch16_224",
        {**SCALED, "use_abs_pos_emb": True, "global_pool": "token"},
        ("anatomy", "weights"),
    ),
    TinyModel("beit", "beit", "beit_base_patch16_224", SIGNALS, ("signals",)),
    TinyModel(
        "beit_shared",
        "beit",
        "beit_base_patch16_224",
        {**SIGNALS, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        ("signals",),
    ),
    TinyModel(
        "beit_both",
        "beit",
        "beit_base_patch16_224",
        {**SIGNALS, "use_shared_rel_pos_bias": True, "qkv_bias": False},
        ("signals",),
    ),
    TinyModel("beit", "beit", "beit_base_patch16_224", CUT, ("cut",)),
    TinyModel("beit", "beit", "beit_base_patch16_224", SHALLOW, ("runs",)),
    # Windows and stages.
    TinyModel(
        "swin",
        "swin",
        SwinTransformer,
        {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
        ("methods",),
        each=True,
    ),
    TinyModel("swin", "swin", "swin_tiny_patch4_window7_224", {**SWIN, "drop_path_rate": 0.3}, ("anatomy", "weights")),
    TinyModel("swin", "swin", "swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4}, ("cut",)),
    TinyModel(
        "swin",
        "swin",
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
        ("runs",),
    ),
    TinyModel(
        "swinv2",
        "swinv2",
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
    ),
    # Convolutional networks.
    TinyModel(
        "convnext",
        "convnext",
        ConvNeXt,
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "drop_path_rate": 0.2},
        ("methods",),
        each=True,
    ),
    TinyModel(
        "convnext",
        "convnext",
        "convnext_tiny",
        {**CONVNEXT, "drop_path_rate": 0.3, "ls_init_value": 0.3},
        ("anatomy",),
    ),
    TinyModel("convnext_conv_mlp", "convnext", "convnext_atto", {**CONVNEXT, "ls_init_value": 0.3}, ("anatomy",)),
    TinyModel("convnext_norm_first", "convnext", "convnext_tiny_hnf", CONVNEXT, ("anatomy",)),
    TinyModel("convnext_v2", "convnext", "convnextv2_atto", CONVNEXT, ("anatomy",)),
    TinyModel("convnext", "convnext", "convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, ("runs",)),
    TinyModel("resnet", "resnet", ResNet, {**RESNET_SMALL, "block": BasicBlock}, ("methods",)),
    TinyModel(
        "resnet_bottleneck",
        "resnet",
        ResNet,
        {**RESNET_SMALL, "block": Bottleneck, "drop_path_rate": 0.2},
        ("methods",),
        each=True,
    ),
    TinyModel("resnet_basic", "resnet", "resnet18", RESNET, ("anatomy",)),
    TinyModel("resnet_bottleneck", "resnet", "resnet50", RESNET, ("anatomy",)),
    TinyModel("resnet_deep_stem", "resnet", "resnet50d", {**RESNET, "drop_path_rate": 0.3}, ("anatomy",)),
    TinyModel("resnet_se", "resnet", "seresnet50", RESNET, ("anatomy",)),
    TinyModel("resnext", "resnet", "resnext50_32x4d", {**RESNET, "cardinality": 4, "base_width": 32}, ("anatomy",)),
    TinyModel("resnet", "resnet", "resnet18", RESNET, ("weights",)),
    TinyModel("resnet", "resnet", "resnet18", RESNET_SMALL, ("runs",)),
    # Read by its stages: depthwise and dense convolutions, squeeze-and-excitation, norms that end in an activation.
    TinyModel("efficientnet", "generic", "test_efficientnet", {}, ("methods",), each=True),
    TinyModel("generic", "generic", "test_efficientnet", {}, ("runs",)),
    # The same with attention: over the whole image in the last two stages, the last one's maps smaller than its window.
    TinyModel("tiny_vit", "tiny_vit", "tiny_vit_5m_224", TINY_VIT, ("methods", "runs"), each=True),
    TinyModel("hiera", "hiera", "hiera_tiny_224", HIERA, ("methods",), each=True),
]


def tiny_models(suite: str) -> dict[str, TinyModel]:
    """Return the rows that a suite uses, by name."""
    rows = [row for row in TINY_MODELS if suite in row.uses]
    found = {row.name: row for row in rows}
    assert len(found) == len(rows), f"two rows of the suite {suite} have one name"
    return found
