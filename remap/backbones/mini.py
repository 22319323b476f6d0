"""The embedded pair of plain vision transformers, registered with timm: 32x32 pixels, patch 4, CIFAR-10 weights.

They exist so that the whole tool runs without a download; their model card is ``weights/README.md``. A third one, with
convolutions for patches, is there to be trained (``benchmarks/stronger_mini_teacher.yaml``); it has no weights yet.
"""

from functools import partial
from pathlib import Path
from typing import Any

from timm.layers import HybridEmbed, LayerNorm2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem

WEIGHTS = Path(__file__).parent / "weights"
# In the order of the classifier's outputs, which is the alphabet's.
CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cfg(name: str) -> dict[str, Any]:
    return {
        "file": str(WEIGHTS / f"{name}.safetensors"),
        "num_classes": 10,
        "label_names": CIFAR_10,
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_mini_student_patch4_32.cifar10": _cfg("vit_mini_student_patch4_32"),
        "vit_mini_teacher_patch4_32.cifar10": _cfg("vit_mini_teacher_patch4_32"),
        "vit_mini_conv_patch4_32": {**_cfg(""), "file": None, "first_conv": "patch_embed.backbone.0.conv"},
    }
)


def _mini(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{"img_size": 32, "patch_size": 4, **kwargs},
    )


@register_model
def vit_mini_student_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the student, 0.68 M parameters: width 128, 4 blocks, 2 heads, MLP ratio 3."""
    shape = {"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_ratio": 3}
    return _mini("vit_mini_student_patch4_32", pretrained, **{**shape, **kwargs})


@register_model
def vit_mini_teacher_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the teacher, 1.51 M parameters: width 192, 4 blocks, 3 heads, MLP ratio 3."""
    shape = {"embed_dim": 192, "depth": 4, "num_heads": 3, "mlp_ratio": 3}
    return _mini("vit_mini_teacher_patch4_32", pretrained, **{**shape, **kwargs})


@register_model
def vit_mini_conv_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a larger teacher, 4.3 M parameters: three convolutions, width 256, 6 blocks, 4 heads, MLP ratio 3.

    Convolutions for patches as in Xiao et al. 2021 (arXiv 2106.14881); layer norms, so that no batch matters.
    """
    shape = {"embed_dim": 256, "depth": 6, "num_heads": 4, "mlp_ratio": 3, **kwargs}
    width, channels = shape["embed_dim"], shape.get("in_chans", 3)
    stem = ConvStem(channels, channels=(64, 128, width), stride=(1, 2, 2), norm_layer=LayerNorm2d)
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    return _mini("vit_mini_conv_patch4_32", pretrained, **{"patch_size": 1, "embed_layer": embed, **shape})
