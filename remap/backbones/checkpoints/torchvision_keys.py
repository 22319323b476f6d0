"""The names that torchvision gives to tensors (torchvision/models), and timm's for them.

Its ResNets have timm's names.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from remap.backbones.checkpoints.layout import Layout, Tensors, rules

_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

_BLOCK = "encoder.layers.encoder_layer_@"
_VIT = Layout(
    "torchvision ViT",
    "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
    rules(
        ("class_token", "cls_token"),
        ("conv_proj.*", "patch_embed.proj.$"),
        ("encoder.pos_embedding", "pos_embed"),
        (f"{_BLOCK}.ln_@.*", r"blocks.\1.norm\2.$"),
        (f"{_BLOCK}.self_attention.in_proj_*", r"blocks.\1.attn.qkv.$"),
        (f"{_BLOCK}.self_attention.out_proj.*", r"blocks.\1.attn.proj.$"),
        (f"{_BLOCK}.mlp.(?:0|linear_1).*", r"blocks.\1.mlp.fc1.$"),
        (f"{_BLOCK}.mlp.(?:3|linear_2).*", r"blocks.\1.mlp.fc2.$"),
        ("encoder.ln.*", "norm.$"),
        ("heads.(?:head.)?*", "head.$"),
    ),
    overlay=_IMAGENET,
)


def _stages(tensors: Tensors) -> Tensors:
    """Number stages and reductions, which torchvision lists one after the other, from 0 and apart."""
    return {_staged(name): tensor for name, tensor in tensors.items()}


def _staged(name: str) -> str:
    """Entry 1 is stage 0, entry 2 the reduction behind it, which timm has at the start of stage 1, and so on."""
    if not name.startswith("features/"):
        return name
    _, number, rest = name.split("/")
    stage, is_reduction = divmod(int(number) - 1, 2)
    return f"layers.{stage + is_reduction}.{rest}"


_SWIN = Layout(
    "torchvision Swin",
    "features.1.0.attn.qkv.weight",
    rules(
        ("features.0.0.*", "patch_embed.proj.$"),
        ("features.0.2.*", "patch_embed.norm.$"),
        ("features.@.@.norm@.*", r"features/\1/blocks.\2.norm\3.$"),
        ("features.@.@.attn.(qkv|proj).*", r"features/\1/blocks.\2.attn.\3.$"),
        ("features.@.@.attn.relative_position_bias_table", r"features/\1/blocks.\2.attn.relative_position_bias_table"),
        ("features.@.@.attn.relative_position_index", None),
        ("features.@.@.mlp.0.*", r"features/\1/blocks.\2.mlp.fc1.$"),
        ("features.@.@.mlp.3.*", r"features/\1/blocks.\2.mlp.fc2.$"),
        ("features.@.(reduction|norm).*", r"features/\1/downsample.\2.$"),
        ("norm.*", "norm.$"),
        ("head.*", "head.fc.$"),
    ),
    _stages,
    overlay=_IMAGENET,
)


def _of_convnext(tensors: Tensors) -> Tensors:
    """Number the stages as timm does; scales are per channel, (C, 1, 1) there."""
    staged = _stages(tensors)
    return {
        name.replace("layers.", "stages.", 1): tensor.reshape(-1) if name.endswith(".gamma") else tensor
        for name, tensor in staged.items()
    }


_CONVNEXT = Layout(
    "torchvision ConvNeXt",
    "features.1.0.layer_scale",
    rules(
        ("features.0.@.*", r"stem.\1.$"),
        ("features.@.@.layer_scale", r"features/\1/blocks.\2.gamma"),
        ("features.@.@.block.0.*", r"features/\1/blocks.\2.conv_dw.$"),
        ("features.@.@.block.2.*", r"features/\1/blocks.\2.norm.$"),
        ("features.@.@.block.3.*", r"features/\1/blocks.\2.mlp.fc1.$"),
        ("features.@.@.block.5.*", r"features/\1/blocks.\2.mlp.fc2.$"),
        ("features.@.@.*", r"features/\1/downsample.\2.$"),
        ("classifier.0.*", "head.norm.$"),
        ("classifier.2.*", "head.fc.$"),
    ),
    _of_convnext,
    overlay=_IMAGENET,
)

LAYOUTS = (_VIT, _SWIN, _CONVNEXT)
