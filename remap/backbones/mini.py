"""The embedded pair of plain vision transformers, registered with timm: 32x32 pixels, patch 4, CIFAR-10 weights.

They exist so that the whole tool runs without a download; their model card is ``weights/README.md``. A third one cuts
its patches by convolutions, and knows CIFAR-10 better; the student has a second file of weights, distilled from it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

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
        "vit_mini_student_patch4_32.cifar10_distilled": _cfg("vit_mini_student_patch4_32.distilled"),
        "vit_mini_teacher_patch4_32.cifar10": _cfg("vit_mini_teacher_patch4_32"),
        "vit_mini_conv_patch4_32.cifar10": {
            **_cfg("vit_mini_conv_patch4_32"),
            "first_conv": "patch_embed.backbone.0",
        },
        "vit_mini_convbn_patch4_32": {**_cfg(""), "file": None, "first_conv": "patch_embed.backbone.0.conv"},
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


# The convolutions for patches of 4x4 pixels, as in Xiao et al. 2021 (arXiv 2106.14881): channels (the last is the
# width) and strides. The blocks are those of the teacher.
_STEM, _STRIDES = (48, 96, 96), (1, 2, 1, 2)
_CONV = {"embed_dim": 192, "depth": 4, "num_heads": 3, "mlp_ratio": 3}


@register_model
def vit_mini_conv_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a teacher of 1.79 M parameters: four convolutions, width 192, 4 blocks, 3 heads, MLP ratio 3."""
    shape = {**_CONV, **kwargs}
    channels, layers = shape.get("in_chans", 3), list[nn.Module]()
    for width, stride in zip((*_STEM, shape["embed_dim"]), _STRIDES, strict=True):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.ReLU()]
        channels = width
    return _behind(nn.Sequential(*layers[:-1]), "vit_mini_conv_patch4_32", pretrained, shape)


@register_model
def vit_mini_convbn_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the same with a batch norm behind each convolution but the last, to be trained from random weights.

    ``tools/ship_mini.py`` folds them into the convolutions (``fold_norms``), so that no batch matters afterwards.
    """
    shape = {**_CONV, **kwargs}
    widths = (*_STEM, shape["embed_dim"])
    stem = ConvStem(shape.get("in_chans", 3), len(widths), widths, kernel_size=3, stride=_STRIDES)
    return _behind(stem, "vit_mini_convbn_patch4_32", pretrained, shape)


def _behind(stem: nn.Sequential, variant: str, pretrained: bool, shape: dict[str, Any]) -> VisionTransformer:
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    return _mini(variant, pretrained, **{"patch_size": 1, "embed_layer": embed, **shape})


def fold_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of ``vit_mini_conv_patch4_32`` that compute what trained ones of ``convbn`` do in evaluation.

    A batch norm maps y to (y - mean) / sqrt(var + eps) * weight + bias: it scales and shifts the convolution before it.
    """
    stem = "patch_embed.backbone"
    folded = {name: value for name, value in state.items() if not name.startswith(f"{stem}.")}
    for number in range(len(_STRIDES)):
        old, new = f"{stem}.{number}", f"{stem}.{2 * number}"
        weight = state[f"{old}.conv.weight"]
        if f"{old}.bn.weight" in state:
            scale = state[f"{old}.bn.weight"] / (state[f"{old}.bn.running_var"] + nn.BatchNorm2d(1).eps).sqrt()
            weight = weight * scale[:, None, None, None]
            bias = state[f"{old}.bn.bias"] - state[f"{old}.bn.running_mean"] * scale
        else:
            bias = state[f"{old}.conv.bias"]
        folded |= {f"{new}.weight": weight, f"{new}.bias": bias}
    return folded
