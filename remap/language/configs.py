"""What open_clip_config.json, or config.json of transformers, says of a text tower; and its tensors' names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from remap.backbones.checkpoints.layout import Layout, Tensors, rules
from remap.language.text_tower import TextConfig

# What changes the forward pass of open_clip's text tower, and ``TextTower`` has not.
_UNKNOWN = (
    "hf_model_name", "embed_cls", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn",
    "scale_fc",
)  # fmt: skip
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_POOLS: dict[str, Literal["end", "last", "first"]] = {
    "argmax": "end", "eos": "end", "last": "last", "first": "first"
}  # fmt: skip
# The vocabulary of CLIP's byte pairs, which open_clip brings.
CLIP_VOCABULARY = 49408
# Defaults of transformers, which its files leave out.
_CLIP = {
    "vocab_size": CLIP_VOCABULARY, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
_SIGLIP = {
    "vocab_size": 32000, "max_position_embeddings": 64, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class TextSide:
    """A text tower and how its texts are written.

    Attributes:
        clean: How texts are cleaned: "lower", "canonicalize" (no punctuation either) or "whitespace".
        pads_with_zero: Whether texts are filled up with id 0, whatever the tokenizer says.
        strips_sep: Whether id 0 takes the place of the separator, as in CLIPA.
    """

    config: TextConfig
    clean: str
    pads_with_zero: bool
    strips_sep: bool = False


def of_open_clip(config: Mapping[str, Any]) -> TextSide:
    """Return what an open_clip_config.json describes, with open_clip's defaults.

    Raises:
        ValueError: It is another kind of text tower; the message is the reason.
    """
    try:
        model = config["model_cfg"]
        text, vision = model["text_cfg"], model["vision_cfg"]
        strange = [name for name in _UNKNOWN if text.get(name)]
        if strange or vision.get("timm_proj") == "mlp":
            raise ValueError(strange[0] if strange else "timm_proj 'mlp'")
        width = int(text.get("width", 512))
        options = dict(text.get("tokenizer_kwargs") or {})
        clean = options.pop("clean", "whitespace" if _hf(text) else "lower")
        strips_sep = bool(options.pop("strip_sep_token", False))
        if options or text.get("tokenizer_mode"):  # they change the ids
            raise ValueError(f"tokenizer_kwargs {next(iter(options))}" if options else "tokenizer_mode")
        if clean not in ("lower", "canonicalize", "whitespace"):
            raise ValueError(f"clean {str(clean)[:40]!r}")
        return TextSide(
            TextConfig(
                vocab=int(text.get("vocab_size", CLIP_VOCABULARY)),
                context=int(text.get("context_length", 77)),
                width=width,
                depth=int(text.get("layers", 12)),
                heads=int(text.get("heads", 8)),
                hidden=int(width * text.get("mlp_ratio", 4.0)),
                out=0 if text.get("proj_type", "linear") == "none" else int(model["embed_dim"]),
                proj_bias=bool(text.get("proj_bias")),
                act=_open_clip_act(model, text),
                eps=float((text.get("norm_kwargs") or {}).get("eps", 1e-5)),
                causal=not text.get("no_causal_mask"),
                pool=_POOLS[text.get("pool_type", "argmax")],
                eos=int(text.get("eos_id", 2)) if text.get("pool_type") == "eos" else None,
                layer_scale=text.get("ls_init_value") is not None,
            ),
            clean=clean,
            pads_with_zero=not _hf(text),
            strips_sep=strips_sep,
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the text tower lacks, or has what is not read: {error}") from error


def _hf(text: Mapping[str, Any]) -> bool:
    return text.get("hf_tokenizer_name") is not None


def _open_clip_act(model: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    options = text.get("act_kwargs") or {}
    if not options:
        return "quick_gelu" if model.get("quick_gelu") else "gelu"
    if options != {"approximate": "tanh"} or model.get("quick_gelu"):
        raise ValueError(f"act_kwargs {str(options)[:60]}")
    return "gelu_tanh"


def of_transformers(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> TextSide:
    """Return what a config.json describes, with the defaults of transformers.

    Args:
        tokenizer: tokenizer_config.json; empty where there is none.

    Raises:
        ValueError: It is not CLIP or SigLIP, or lacks something; the message is the reason.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"model_type {str(kind)[:40]!r} has no text tower that is read (allowed: clip, siglip)")
    is_clip = kind == "clip"
    try:
        text = {**(_CLIP if is_clip else _SIGLIP), **(config.get("text_config") or {})}
        text |= config.get("text_config_dict") or {}
        out = config.get("projection_dim", 512) if is_clip else text.get("projection_size") or text["hidden_size"]
        found = TextConfig(
            vocab=int(text["vocab_size"]),
            context=int(text["max_position_embeddings"]),
            width=int(text["hidden_size"]),
            depth=int(text["num_hidden_layers"]),
            heads=int(text["num_attention_heads"]),
            hidden=int(text["intermediate_size"]),
            out=int(out),
            proj_bias=not is_clip,
            act=_ACTIVATIONS[str(text["hidden_act"])],
            eps=float(text["layer_norm_eps"]),
            causal=is_clip,
            pool="end" if is_clip else "last",
            # The number 2 in older files is wrong, and transformers takes the largest id then.
            eos=int(text["eos_token_id"]) if is_clip and text["eos_token_id"] != 2 else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the text tower of {kind!r} lacks or misstates {error}") from error
    bare = str(tokenizer.get("tokenizer_class", "SiglipTokenizer")).startswith("SiglipTokenizer") and not is_clip
    return TextSide(found, clean="canonicalize" if bare else "lower", pads_with_zero=False)


def _turned(tensors: Tensors) -> Tensors:
    """Turn the projection, which open_clip multiplies from the right where it has no bias."""
    if "projection" in tensors:
        tensors["proj.weight"] = tensors.pop("projection").mT.contiguous()
    return tensors


_TEXT = "(?:text.)?"
_OPEN_CLIP = Layout(
    "open_clip",
    f"{_TEXT}transformer.resblocks.0.ln_1.weight",
    rules(
        ("visual.~", None),
        ("logit_(?:scale|bias)", None),
        (f"{_TEXT}attn_mask", None),
        (f"{_TEXT}token_embedding.weight", "token_embedding.weight"),
        (f"{_TEXT}positional_embedding", "positions"),
        (f"{_TEXT}transformer.resblocks.@.ln_@.*", r"blocks.\1.norm\2.$"),
        (f"{_TEXT}transformer.resblocks.@.attn.in_proj_(?P<kind>weight|bias)", r"blocks.\1.attn.qkv.$"),
        (f"{_TEXT}transformer.resblocks.@.attn.out_proj.*", r"blocks.\1.attn.proj.$"),
        (f"{_TEXT}transformer.resblocks.@.mlp.c_fc.*", r"blocks.\1.mlp.fc1.$"),
        (f"{_TEXT}transformer.resblocks.@.mlp.c_proj.*", r"blocks.\1.mlp.fc2.$"),
        (f"{_TEXT}transformer.resblocks.@.ls_@.gamma", r"blocks.\1.ls\2.gamma"),
        (f"{_TEXT}ln_final.*", "norm.$"),
        (f"{_TEXT}text_projection", "projection"),
        (f"{_TEXT}text_projection.*", "proj.$"),
    ),
    _turned,
)
_LAYER = "text_model.encoder.layers.@"
_TRANSFORMERS = Layout(
    "transformers CLIP, SigLIP",
    "text_model.encoder.layers.0.self_attn.q_proj.weight",
    rules(
        ("vision_model.~", None),
        ("(?:logit_scale|logit_bias|visual_projection.weight)", None),
        ("text_model.embeddings.position_ids", None),
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "positions"),
        (f"{_LAYER}.self_attn.q_proj.*", r"blocks.\1.attn.qkv.$#0"),
        (f"{_LAYER}.self_attn.k_proj.*", r"blocks.\1.attn.qkv.$#1"),
        (f"{_LAYER}.self_attn.v_proj.*", r"blocks.\1.attn.qkv.$#2"),
        (f"{_LAYER}.self_attn.out_proj.*", r"blocks.\1.attn.proj.$"),
        (f"{_LAYER}.layer_norm@.*", r"blocks.\1.norm\2.$"),
        (f"{_LAYER}.mlp.fc@.*", r"blocks.\1.mlp.fc\2.$"),
        ("text_model.final_layer_norm.*", "norm.$"),
        ("text_projection.weight", "proj.weight"),
        ("text_model.head.*", "proj.$"),
    ),
)
TEXT_LAYOUTS = (_OPEN_CLIP, _TRANSFORMERS)
