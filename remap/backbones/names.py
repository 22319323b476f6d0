"""Short names of models and the timm tags they stand for. Imports nothing heavy."""

from typing import NamedTuple


class ShortName(NamedTuple):
    """What a short name stands for.

    Attributes:
        timm: Name and tag of timm.
        parameters: Parameters without head, in millions.
        pixels: Side of the square input.
        weights: What the weights were trained on.
    """

    timm: str
    parameters: float
    pixels: int
    weights: str


MODELS = {
    "mini_student": ShortName("vit_mini_student_patch4_32.cifar10", 0.7, 32, "CIFAR-10, shipped"),
    "mini_teacher": ShortName("vit_mini_teacher_patch4_32.cifar10", 1.5, 32, "CIFAR-10, shipped"),
    "mini_conv": ShortName("vit_mini_conv_patch4_32.cifar10", 1.8, 32, "CIFAR-10, shipped"),
    "mini_distilled": ShortName(
        "vit_mini_student_patch4_32.cifar10_distilled", 0.7, 32, "CIFAR-10 under mini_conv, shipped"
    ),
    "vit_tiny": ShortName("vit_tiny_patch16_224.augreg_in21k", 5.5, 224, "IN-21k, AugReg"),
    "vit_small": ShortName("vit_small_patch16_224.augreg_in21k", 21.7, 224, "IN-21k, AugReg"),
    "vit_base": ShortName("vit_base_patch16_224.augreg_in21k", 85.8, 224, "IN-21k, AugReg"),
    "vit_large": ShortName("vit_large_patch16_224.augreg_in21k", 303.3, 224, "IN-21k, AugReg"),
    "vit_huge": ShortName("vit_huge_patch14_224.orig_in21k", 630.8, 224, "IN-21k"),
    "mae_base": ShortName("vit_base_patch16_224.mae", 85.8, 224, "IN-1k, MAE"),
    "deit3_small": ShortName("deit3_small_patch16_224.fb_in22k_ft_in1k", 21.7, 224, "IN-21k and IN-1k, DeiT-III"),
    "dinov2_small": ShortName("vit_small_patch14_dinov2.lvd142m", 22.1, 518, "LVD-142M, DINOv2"),
    "dinov2_base": ShortName("vit_base_patch14_dinov2.lvd142m", 86.6, 518, "LVD-142M, DINOv2"),
    "dinov3_small": ShortName("vit_small_patch16_dinov3.lvd1689m", 21.6, 256, "LVD-1689M, DINOv3"),
    "dinov3_base": ShortName("vit_base_patch16_dinov3.lvd1689m", 85.6, 256, "LVD-1689M, DINOv3"),
    "siglip_base": ShortName("vit_base_patch16_siglip_224.webli", 92.9, 224, "WebLI, SigLIP"),
    "eva02_small": ShortName("eva02_small_patch14_224.mim_in22k", 21.6, 224, "IN-21k, EVA-02"),
    "beitv2_base": ShortName("beitv2_base_patch16_224.in1k_ft_in22k", 85.8, 224, "IN-1k and IN-21k, BEiT v2"),
    "swin_tiny": ShortName("swin_tiny_patch4_window7_224.ms_in22k", 27.5, 224, "IN-21k"),
    "swin_base": ShortName("swin_base_patch4_window7_224.ms_in22k", 86.7, 224, "IN-21k"),
    "convnext_tiny": ShortName("convnext_tiny.fb_in22k", 27.8, 224, "IN-21k"),
    "convnext_base": ShortName("convnext_base.fb_in22k", 87.6, 224, "IN-21k"),
    "resnet50": ShortName("resnet50.a1_in1k", 23.5, 224, "IN-1k"),
}

SHORT_NAMES = {name: model.timm for name, model in MODELS.items()}
# timm names of the models whose weights come with this package.
EMBEDDED = frozenset(model.timm for model in MODELS.values() if model.weights.endswith("shipped"))

# How the weights behind a short name are read where the name implies it; see ``build``.
PRESETS = {"mae_base": "mae"}


def resolve_name(word: str) -> str:
    """Return the timm name behind a short name; other words stay as they are."""
    name = SHORT_NAMES.get(word, word)
    return f"hf-hub:{name}" if name.startswith("timm/") else name


def is_embedded(word: str) -> bool:
    """Whether a word names a model whose weights come with this package, by its short or its timm name."""
    return resolve_name(word) in EMBEDDED


def preset_of(word: str, preset: str | None = None) -> str:
    """Return the preset of a model: the one that was given, else the one its short name implies."""
    return PRESETS.get(word, "none") if preset is None else preset


# What the name of a vision-language model begins with.
PAIR = "clip:"


def is_pair(word: str) -> bool:
    """Whether a word names a vision-language model."""
    return word.startswith(PAIR)


# Kinds of files that hold weights; all but the first are pickles.
WEIGHTS_FILES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")


def is_weights_file(word: str) -> bool:
    """Whether a word names a file of weights, which may be missing."""
    return word.endswith(WEIGHTS_FILES) and not word.startswith(("local-dir:", "hf-hub:", "hf_hub:"))
