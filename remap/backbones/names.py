"""Short names and the timm tags they stand for. Imports nothing heavy."""

SHORT_NAMES = {
    "mini_student": "vit_mini_student_patch4_32.cifar10",
    "mini_teacher": "vit_mini_teacher_patch4_32.cifar10",
    "vit_tiny": "vit_tiny_patch16_224.augreg_in21k",
    "vit_small": "vit_small_patch16_224.augreg_in21k",
    "vit_base": "vit_base_patch16_224.augreg_in21k",
    "vit_large": "vit_large_patch16_224.augreg_in21k",
    "vit_huge": "vit_huge_patch14_224.orig_in21k",
    "mae_base": "vit_base_patch16_224.mae",
    "deit3_small": "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "dinov2_small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_base": "vit_base_patch14_dinov2.lvd142m",
    "dinov3_small": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_base": "vit_base_patch16_dinov3.lvd1689m",
    "siglip_base": "vit_base_patch16_siglip_224.webli",
    "eva02_small": "eva02_small_patch14_224.mim_in22k",
    "beitv2_base": "beitv2_base_patch16_224.in1k_ft_in22k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in22k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k",
    "convnext_tiny": "convnext_tiny.fb_in22k",
    "convnext_base": "convnext_base.fb_in22k",
    "resnet50": "resnet50.a1_in1k",
}

# How the weights behind a short name are read out where the name says it; see ``build``.
PRESETS = {"mae_base": "mae"}

# What each short name is, for listings: (parameters without head in millions, input pixels, weights).
ABOUT = {
    "mini_student": ("0.7", 32, "CIFAR-10, shipped"),
    "mini_teacher": ("1.5", 32, "CIFAR-10, shipped"),
    "vit_tiny": ("5.5", 224, "IN-21k, AugReg"),
    "vit_small": ("21.7", 224, "IN-21k, AugReg"),
    "vit_base": ("85.8", 224, "IN-21k, AugReg"),
    "vit_large": ("303.3", 224, "IN-21k, AugReg"),
    "vit_huge": ("630.8", 224, "IN-21k"),
    "mae_base": ("85.8", 224, "IN-1k, MAE"),
    "deit3_small": ("21.7", 224, "IN-21k and IN-1k, DeiT-III"),
    "dinov2_small": ("22.1", 518, "LVD-142M, DINOv2"),
    "dinov2_base": ("86.6", 518, "LVD-142M, DINOv2"),
    "dinov3_small": ("21.6", 256, "LVD-1689M, DINOv3"),
    "dinov3_base": ("85.6", 256, "LVD-1689M, DINOv3"),
    "siglip_base": ("92.9", 224, "WebLI, SigLIP"),
    "eva02_small": ("21.6", 224, "IN-21k, EVA-02"),
    "beitv2_base": ("85.8", 224, "IN-1k and IN-21k, BEiT v2"),
    "swin_tiny": ("27.5", 224, "IN-21k"),
    "swin_base": ("86.7", 224, "IN-21k"),
    "convnext_tiny": ("27.8", 224, "IN-21k"),
    "convnext_base": ("87.6", 224, "IN-21k"),
    "resnet50": ("23.5", 224, "IN-1k"),
}
