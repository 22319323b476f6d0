"""Short names and the timm tags they stand for. Imports nothing heavy."""

SHORT_NAMES = {
    "mini_student": "vit_mini_student_patch4_32.cifar10",
    "mini_teacher": "vit_mini_teacher_patch4_32.cifar10",
    "vit_tiny": "vit_tiny_patch16_224.augreg_in21k",
    "vit_small": "vit_small_patch16_224.augreg_in21k",
    "vit_base": "vit_base_patch16_224.augreg_in21k",
    "vit_large": "vit_large_patch16_224.augreg_in21k",
    "vit_huge": "vit_huge_patch14_224.orig_in21k",
}

# What each short name is, for listings: (parameters without head in millions, input pixels, weights).
ABOUT = {
    "mini_student": ("0.7", 32, "CIFAR-10, shipped"),
    "mini_teacher": ("1.5", 32, "CIFAR-10, shipped"),
    "vit_tiny": ("5.5", 224, "IN-21k, AugReg"),
    "vit_small": ("21.7", 224, "IN-21k, AugReg"),
    "vit_base": ("85.8", 224, "IN-21k, AugReg"),
    "vit_large": ("303.3", 224, "IN-21k, AugReg"),
    "vit_huge": ("630.8", 224, "IN-21k"),
}
