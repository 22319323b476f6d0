"""The image tower of an open_clip model: its open_clip_config.json, in timm's words. timm's filter knows its keys."""

from collections.abc import Mapping
from typing import Any

from remap.backbones.checkpoints.layout import Described, Layout, rules

# What changes the forward pass of open_clip's own tower, and is not read here.
_UNKNOWN = (
    "attentional_pool", "attn_pooler_queries", "input_patchnorm", "pos_embed_type", "final_ln_after_pool",
    "act_kwargs", "norm_kwargs",
)  # fmt: skip
# Poolings of open_clip's own behind a network of timm.
_OWN_POOLS = ("abs_attn", "rot_attn")
_WIDTH_OF_HEAD, _MLP_RATIO, _SIDE = 64, 4.0, 224

LAYOUT = Layout(
    "open_clip",
    "visual.(?:class_embedding|trunk.~)",
    # The projection into the space of the texts is not part of the tower; nor is the text tower itself.
    rules(("visual.(?:proj|head.~)", None), ("(visual.~)", r"\1"), ("~", None)),
)


def describe(config: Mapping[str, Any]) -> Described:
    """Return the timm model that open_clip_config.json describes.

    Raises:
        ValueError: timm has no such model; the message is the reason.
    """
    try:
        model, view = config["model_cfg"], config.get("preprocess_cfg", {})
        vision = model["vision_cfg"]
        strange = [name for name in _UNKNOWN if vision.get(name)]
        if strange or isinstance(vision.get("layers"), list):
            raise ValueError(strange[0] if strange else "layers (a ResNet of CLIP's own kind)")
        side = int(vision.get("image_size", _SIDE))
        overlay: dict[str, Any] = {"crop_pct": 1.0, "input_size": (3, side, side)}
        overlay |= {name: tuple(map(float, view[name])) for name in ("mean", "std") if name in view}
        if view.get("interpolation") in ("bicubic", "bilinear"):
            overlay["interpolation"] = view["interpolation"]
        if "timm_model_name" in vision:
            if vision.get("timm_proj") not in (None, "", "none", "linear", "mlp"):
                raise ValueError("timm_proj")
            pool = str(vision.get("timm_pool", "avg"))
            if pool in _OWN_POOLS:
                raise ValueError(f"timm_pool {pool!r}")
            architecture = str(vision["timm_model_name"])
            arguments: dict[str, Any] = {"global_pool": pool} if pool else {}
        else:
            architecture = "vit_base_patch16_clip_224"
            arguments = {
                "img_size": side,
                "patch_size": vision["patch_size"],
                "embed_dim": vision["width"],
                "depth": vision["layers"],
                "num_heads": vision["width"] // vision.get("head_width", _WIDTH_OF_HEAD),
                "mlp_ratio": vision.get("mlp_ratio", _MLP_RATIO),
                "pre_norm": not vision.get("no_ln_pre", False),
                "act_layer": "quick_gelu" if model.get("quick_gelu") else "gelu",
                # Its last norm stands in front of the pooling, also of the mean.
                "global_pool": {"tok": "token", "avg": "avg"}[vision.get("pool_type", "tok")],
                "fc_norm": False,
            }
            if "ls_init_value" in vision and vision["ls_init_value"] is not None:
                raise ValueError("ls_init_value")
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the configuration lacks, or has what timm has not: {error}") from error
    return Described(architecture, arguments, overlay, library="open_clip")
