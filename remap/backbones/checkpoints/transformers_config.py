"""What a config.json of Hugging Face transformers says of a vision model, in timm's words."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import SwiGLUPacked

from remap.backbones.checkpoints.layout import Described
from remap.backbones.families.vit import mlp_ratio

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Pillow's numbers of filters; timm has no Lanczos for tensors.
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def describe(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> Described:
    """Return the timm model that a configuration describes.

    Args:
        config: config.json, with its ``model_type``.
        preprocessor: preprocessor_config.json; None where there is none.

    Raises:
        ValueError: timm has no such model; the message is the reason.
    """
    kind = str(config.get("model_type"))
    if kind not in _KINDS:
        raise ValueError(f"model_type {kind[:40]!r} is not one of {', '.join(_KINDS)}")
    # Of a model of images and texts, a part describes the images; what the weights are for stands outside.
    try:
        vision = {**config.get("vision_config", config), **(config.get("vision_config_dict") or {})}
        vision["architectures"] = config.get("architectures") or []
        found = _KINDS[kind](vision)
        side = _side(vision.get("image_size", 224))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"the configuration of {kind!r} lacks or misstates {error}") from error
    any_size = "convnext" in found.architecture
    notes = () if preprocessor else ("preprocessor_config.json is missing: timm's normalisation is used",)
    return Described(
        found.architecture,
        found.arguments if any_size else {"img_size": side, **found.arguments},
        {"input_size": (3, side, side), "crop_pct": 1.0, **_preprocessing(preprocessor or {}, any_size)},
        labels=_labels(config.get("id2label")),
        eps=found.eps,
        library="transformers",
        notes=notes,
    )


def _plain(architecture: str, config: Mapping[str, Any], **more: Any) -> Described:
    width, hidden = config["hidden_size"], config.get("intermediate_size", 4 * config["hidden_size"])
    arguments = {
        "patch_size": _side(config["patch_size"]),
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": mlp_ratio(hidden, width),
        "qkv_bias": config.get("qkv_bias", True),  # files from before there was this word are of layers with one
        **more,
    }
    return Described(architecture, arguments, eps={"": float(config["layer_norm_eps"])})


def _act(config: Mapping[str, Any]) -> str:
    return _ACTIVATIONS[str(config["hidden_act"])]


def _require_act(config: Mapping[str, Any], allowed: str = "gelu") -> None:
    if _act(config) != allowed:
        raise ValueError(f"hidden_act {str(config['hidden_act'])!r} (timm has {allowed})")


def _vit(config: Mapping[str, Any]) -> Described:
    return _plain("vit_base_patch16_224", config, global_pool="token", act_layer=_act(config), pre_norm=False)


def _deit(config: Mapping[str, Any]) -> Described:
    """With one classifier the distillation token is one that is not read, a register; with two, timm's own DeiT."""
    if "WithTeacher" in str(config["architectures"]):
        return _plain("deit_base_distilled_patch16_224", config, act_layer=_act(config))
    found = _vit(config)
    return Described(found.architecture, {**found.arguments, "reg_tokens": 1}, eps=found.eps)


def _dinov2(config: Mapping[str, Any]) -> Described:
    width, gated = config["hidden_size"], config["use_swiglu_ffn"]
    hidden = int(width * config["mlp_ratio"])
    mlp: dict[str, Any] = {"act_layer": _act(config)}
    if gated:  # two layers of 2/3 of the width in one, rounded up to a multiple of 8
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
        mlp = {"mlp_layer": SwiGLUPacked, "act_layer": "silu"}
    registers = config.get("num_register_tokens", 0)
    tokens = {"reg_tokens": registers, "no_embed_class": registers > 0}
    return _plain(
        "vit_base_patch14_dinov2",
        {**config, "intermediate_size": hidden},
        **{**mlp, **tokens, "global_pool": "token", "init_values": 1.0},
    )


def _dinov3(config: Mapping[str, Any]) -> Described:
    _require_act(config, "silu" if config["use_gated_mlp"] else "gelu")
    has_bias = bool(config["query_bias"] or config["value_bias"])
    if config["key_bias"] or config["query_bias"] != config["value_bias"]:
        raise ValueError("key_bias (timm has none)")
    more = {"qkv_bias": has_bias, "num_reg_tokens": config["num_register_tokens"]}
    if config["use_gated_mlp"]:  # aligned: the gate is a layer of its own
        more |= {"swiglu_mlp": True, "swiglu_align_to": 1}
    found = _plain("vit_small_patch16_dinov3", config, global_pool="token", **more)
    temperature = float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    return Described(found.architecture, {**found.arguments, "rope_temperature": temperature}, eps=found.eps)


def _beit(config: Mapping[str, Any]) -> Described:
    _require_act(config)
    return _plain(
        "beit_base_patch16_224",
        config,
        global_pool="avg" if config["use_mean_pooling"] else "token",
        init_values=config["layer_scale_init_value"] or None,
        use_abs_pos_emb=config["use_absolute_position_embeddings"],
        use_rel_pos_bias=config["use_relative_position_bias"],
        use_shared_rel_pos_bias=config["use_shared_relative_position_bias"],
    )


def _swin(config: Mapping[str, Any]) -> Described:
    _require_act(config)
    if config["use_absolute_embeddings"]:
        raise ValueError("use_absolute_embeddings (timm's Swin has none)")
    arguments = {
        "patch_size": config["patch_size"],
        "window_size": config["window_size"],
        "embed_dim": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "num_heads": tuple(config["num_heads"]),
        "mlp_ratio": config["mlp_ratio"],
        "qkv_bias": config["qkv_bias"],
    }
    # Its norms have PyTorch's eps but for those inside the blocks.
    blocks = {f"layers.{stage}.blocks": float(config["layer_norm_eps"]) for stage in range(len(config["depths"]))}
    return Described("swin_tiny_patch4_window7_224", arguments, eps={**blocks, "norm": float(config["layer_norm_eps"])})


def _convnext(config: Mapping[str, Any]) -> Described:
    _require_act(config)
    second = config["model_type"] == "convnextv2"
    arguments = {
        "dims": tuple(config["hidden_sizes"]),
        "depths": tuple(config["depths"]),
        "patch_size": config["patch_size"],
    }
    if not second:
        arguments["ls_init_value"] = config["layer_scale_init_value"] or None
    return Described(
        "convnextv2_tiny" if second else "convnext_tiny", arguments, eps={"head.norm": float(config["layer_norm_eps"])}
    )


# Defaults of transformers, which files of its models of images and texts leave out.
_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP = {**_TOWER, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {**_TOWER, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def _clip(config: Mapping[str, Any]) -> Described:
    """Of a classifier, which reads the mean of the patches in front of the last norm, timm's model has no such norm."""
    config = {**_CLIP, **config}
    pool: dict[str, Any] = {"global_pool": "token"}
    if "ForImageClassification" in str(config["architectures"]):
        pool = {"global_pool": "avg", "final_norm": False, "fc_norm": False}
    return _plain("vit_base_patch16_clip_224", config, act_layer=_act(config), pre_norm=True, **pool)


def _siglip(config: Mapping[str, Any]) -> Described:
    config = {**_SIGLIP, **config}
    classifies = "ForImageClassification" in str(config["architectures"])
    pool = "avg" if classifies or not config.get("vision_use_head", True) else "map"
    return _plain("vit_base_patch16_siglip_224", config, act_layer=_act(config), global_pool=pool, fc_norm=False)


_KINDS: dict[str, Callable[[Mapping[str, Any]], Described]] = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "beit": _beit,
    "swin": _swin,
    "convnext": _convnext,
    "convnextv2": _convnext,
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
}


def _preprocessing(values: Mapping[str, Any], any_size: bool) -> dict[str, Any]:
    """Return what preprocessor_config.json says, in the words of timm's pretrained_cfg.

    Args:
        any_size: The model is a ConvNeXt: the config.json of all published ones says 224, also of those for 384 pixels.
    """
    found: dict[str, Any] = {}
    if values.get("do_normalize", True) and "image_mean" in values:
        found |= {"mean": tuple(map(float, values["image_mean"])), "std": tuple(map(float, values["image_std"]))}
    elif not values.get("do_normalize", True):
        found |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if values.get("resample") in _FILTERS:
        found["interpolation"] = _FILTERS[values["resample"]]
    edge, crop = (_edge(values.get(key)) for key in ("size", "crop_size"))
    if any_size and edge:
        found["input_size"] = (3, int(edge), int(edge))
    if "crop_pct" in values:  # ConvNeXt's, which has an effect below 384 pixels only
        found["crop_pct"] = float(values["crop_pct"] or 1.0) if (edge or 0) < 384 else 1.0
    elif values.get("do_center_crop") and edge and crop:
        found["crop_pct"] = min(1.0, crop / edge)
    return found


def _edge(size: Any) -> float | None:
    value = (size.get("shortest_edge") or size.get("height")) if isinstance(size, dict) else size
    return float(value) if isinstance(value, (int, float)) else None


def _labels(names: Any) -> tuple[str, ...]:
    """Return the names of the outputs in order; those that transformers fills in by itself are none."""
    if not isinstance(names, dict) or set(names) != {str(index) for index in range(len(names))}:
        return ()
    found = tuple(str(names[str(index)]) for index in range(len(names)))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(found)) else found


def _side(value: Any) -> int:
    """Return the side of a square; sizes are numbers, or pairs in older files."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise ValueError(f"a square size, not {str(value)[:40]}")
    return side
