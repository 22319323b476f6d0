"""The names that Hugging Face transformers gives to tensors (its modeling_*.py), and timm's for them.

Version 5 calls attention and MLP by other names in a model, and by the older ones in the files of ``save_pretrained``:
the new ones are in files that a script of one's own wrote (``torch.save(model.state_dict(), ...)``).
"""

from remap.backbones.checkpoints.layout import Layout, Rules, Tensors, rules

# A classifier's model has the backbone under a name of its own.
_ROOT = "(?:(?:vit|deit|dinov2|dinov2_with_registers|dinov3_vit|beit|swin|convnext|convnextv2|model).)?"


def _rooted(*rows: tuple[str, str | None]) -> Rules:
    return rules(*((_ROOT + pattern, name) for pattern, name in rows))


_CLASSIFIERS = rules(
    ("classifier.*", "head.$"), ("cls_classifier.*", "head.$"), ("distillation_classifier.*", "head_dist.$")
)
_PATCHES = ("embeddings.patch_embeddings.projection.*", "patch_embed.proj.$")
_TABLE = "relative_position_bias.relative_position_bias_table"
_VIT_LAYER = "(?:encoder.layer|layers).@"


def _of_vit(tensors: Tensors) -> Tensors:
    """Fit the prefix tokens: DeiT's distillation token, which timm has for two classifiers only, and registers."""
    token = tensors.pop("distillation", None)
    if token is not None:
        tensors["dist_token" if "head_dist.weight" in tensors else "reg_token"] = token
    elif "reg_token" in tensors:  # timm's position embeddings are then those of the patches alone
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    if "head.weight" in tensors and tensors["head.weight"].shape[1] != tensors["cls_token"].shape[-1]:
        # DINOv2's reads the class token beside the mean of the patches, which no model of timm gives.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    return tensors


_VIT = Layout(
    "transformers ViT, DeiT, DINOv2, BEiT",
    f"{_ROOT}(?:encoder.layer.0.attention.attention.query|(?:encoder.layer|layers).0.attention.q_proj).weight",
    (
        *_CLASSIFIERS,
        *_rooted(
            _PATCHES,
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.distillation_token", "distillation"),
            ("embeddings.register_tokens", "reg_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.mask_token", None),
            (f"{_VIT_LAYER}.attention.(?:attention.query|q_proj).*", r"blocks.\1.attn.qkv.$#0"),
            (f"{_VIT_LAYER}.attention.(?:attention.key|k_proj).*", r"blocks.\1.attn.qkv.$#1"),
            (f"{_VIT_LAYER}.attention.(?:attention.value|v_proj).*", r"blocks.\1.attn.qkv.$#2"),
            (f"{_VIT_LAYER}.(?:attention.attention.)?{_TABLE}", r"blocks.\1.attn.relative_position_bias_table"),
            (f"{_VIT_LAYER}.attention.(?:output.dense|o_proj).*", r"blocks.\1.attn.proj.$"),
            (f"{_VIT_LAYER}.(?:layernorm_before|norm1).*", r"blocks.\1.norm1.$"),
            (f"{_VIT_LAYER}.(?:layernorm_after|norm2).*", r"blocks.\1.norm2.$"),
            (f"{_VIT_LAYER}.(?:intermediate.dense|mlp.fc1|mlp.weights_in).*", r"blocks.\1.mlp.fc1.$"),
            (f"{_VIT_LAYER}.mlp.gate_proj.*", r"blocks.\1.mlp.fc1.$#0"),
            (f"{_VIT_LAYER}.mlp.up_proj.*", r"blocks.\1.mlp.fc1.$#1"),
            (f"{_VIT_LAYER}.(?:output.dense|mlp.fc2|mlp.weights_out|mlp.down_proj).*", r"blocks.\1.mlp.fc2.$"),
            (f"{_VIT_LAYER}.layer_scale@.lambda1", r"blocks.\1.ls\2.gamma"),
            (f"{_VIT_LAYER}.lambda_@", r"blocks.\1.gamma_\2"),
            (
                f"(?:encoder.{_TABLE}|shared_position_bias.relative_position_bias_table)",
                "rel_pos_bias.relative_position_bias_table",
            ),
            ("~relative_position_index", None),
            ("layernorm.*", "norm.$"),
            ("pooler.layernorm.*", "fc_norm.$"),
            ("pooler.dense.*", None),
        ),
    ),
    _of_vit,
)


def _of_dinov3(tensors: Tensors) -> Tensors:
    """Name the gated MLP's two layers as timm does, where there is a gate; no registers are a tensor of no tokens."""
    gated = any(".mlp.fc1_g." in name for name in tensors)
    return {name.replace(".fc1.", ".fc1_x.") if gated else name: t for name, t in tensors.items() if t.numel()}


_DINOV3 = Layout(
    "transformers DINOv3",
    f"{_ROOT}(?:model.)?layer.0.attention.q_proj.weight",
    (
        *_CLASSIFIERS,
        *_rooted(
            ("embeddings.patch_embeddings.*", "patch_embed.proj.$"),
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.register_tokens", "reg_token"),
            ("embeddings.mask_token", None),
            ("(?:model.)?layer.@.attention.q_proj.*", r"blocks.\1.attn.qkv.$#0"),
            ("(?:model.)?layer.@.attention.k_proj.*", r"blocks.\1.attn.qkv.$#1"),
            ("(?:model.)?layer.@.attention.v_proj.*", r"blocks.\1.attn.qkv.$#2"),
            ("(?:model.)?layer.@.attention.o_proj.*", r"blocks.\1.attn.proj.$"),
            ("(?:model.)?layer.@.norm@.*", r"blocks.\1.norm\2.$"),
            ("(?:model.)?layer.@.layer_scale@.lambda1", r"blocks.\1.gamma_\2"),
            ("(?:model.)?layer.@.mlp.up_proj.*", r"blocks.\1.mlp.fc1.$"),
            ("(?:model.)?layer.@.mlp.gate_proj.*", r"blocks.\1.mlp.fc1_g.$"),
            ("(?:model.)?layer.@.mlp.down_proj.*", r"blocks.\1.mlp.fc2.$"),
            ("norm.*", "norm.$"),
        ),
    ),
    _of_dinov3,
)


def _of_swin(tensors: Tensors) -> Tensors:
    """Move each reduction to the start of the next stage, where timm has it."""
    moved = {name: name for name in tensors}
    for name in tensors:
        stage, _, rest = name.removeprefix("layers.").partition(".")
        if rest.startswith("downsample."):
            moved[name] = f"layers.{int(stage) + 1}.{rest}"
    return {moved[name]: tensor for name, tensor in tensors.items()}


_BLOCK = "encoder.layers.@.blocks.@"
_SWIN = Layout(
    "transformers Swin",
    f"{_ROOT}encoder.layers.0.blocks.0.attention.(?:self.query|q_proj).weight",
    (
        *rules(("classifier.*", "head.fc.$")),
        *_rooted(
            _PATCHES,
            ("embeddings.norm.*", "patch_embed.norm.$"),
            ("embeddings.mask_token", None),
            (f"{_BLOCK}.attention.(?:self.query|q_proj).*", r"layers.\1.blocks.\2.attn.qkv.$#0"),
            (f"{_BLOCK}.attention.(?:self.key|k_proj).*", r"layers.\1.blocks.\2.attn.qkv.$#1"),
            (f"{_BLOCK}.attention.(?:self.value|v_proj).*", r"layers.\1.blocks.\2.attn.qkv.$#2"),
            (
                f"{_BLOCK}.attention.(?:self|relative_position_bias).relative_position_bias_table",
                r"layers.\1.blocks.\2.attn.relative_position_bias_table",
            ),
            ("~relative_position_index", None),
            (f"{_BLOCK}.attention.(?:output.dense|o_proj).*", r"layers.\1.blocks.\2.attn.proj.$"),
            (f"{_BLOCK}.layernorm_before.*", r"layers.\1.blocks.\2.norm1.$"),
            (f"{_BLOCK}.layernorm_after.*", r"layers.\1.blocks.\2.norm2.$"),
            (f"{_BLOCK}.(?:intermediate.dense|mlp.fc1).*", r"layers.\1.blocks.\2.mlp.fc1.$"),
            (f"{_BLOCK}.(?:output.dense|mlp.fc2).*", r"layers.\1.blocks.\2.mlp.fc2.$"),
            ("encoder.layers.@.downsample.norm.*", r"layers.\1.downsample.norm.$"),
            ("encoder.layers.@.downsample.reduction.weight", r"layers.\1.downsample.reduction.weight"),
            ("layernorm.*", "norm.$"),
        ),
    ),
    _of_swin,
)

_LAYER = "encoder.stages.@.layers.@"
_CONVNEXT = Layout(
    "transformers ConvNeXt",
    f"{_ROOT}encoder.stages.0.layers.0.dwconv.weight",
    (
        *rules(("classifier.*", "head.fc.$")),
        *_rooted(
            ("embeddings.patch_embeddings.*", "stem.0.$"),
            ("embeddings.layernorm.*", "stem.1.$"),
            ("encoder.stages.@.downsampling_layer.@.*", r"stages.\1.downsample.\2.$"),
            (f"{_LAYER}.layer_scale_parameter", r"stages.\1.blocks.\2.gamma"),
            (f"{_LAYER}.dwconv.*", r"stages.\1.blocks.\2.conv_dw.$"),
            (f"{_LAYER}.layernorm.*", r"stages.\1.blocks.\2.norm.$"),
            (f"{_LAYER}.pwconv@.*", r"stages.\1.blocks.\2.mlp.fc\3.$"),
            (f"{_LAYER}.grn.*", r"stages.\1.blocks.\2.mlp.grn.$"),
            ("layernorm.*", "head.norm.$"),
        ),
    ),
    lambda tensors: {name: t.reshape(-1) if ".grn." in name else t for name, t in tensors.items()},
)


def _of_clip(tensors: Tensors) -> Tensors:
    """Give the tokens their batch axis, and divide the pooling's in-projection.

    A classifier pools by the mean: SigLIP's leaves the attention pooling out, CLIP's the norm behind the blocks.
    """
    if "cls_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
    tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    if "head.weight" in tensors:
        unused = "norm." if "cls_token" in tensors else "attn_pool."
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    width = tensors["pos_embed"].shape[-1]
    for kind in ("weight", "bias"):
        joined = tensors.pop(f"attn_pool.in_proj_{kind}", None)
        if joined is not None:
            tensors |= {f"attn_pool.q.{kind}": joined[:width], f"attn_pool.kv.{kind}": joined[width:]}
    return tensors


_VISION = "(?:(?:vision_model|siglip|clip).){0,2}"
_CLIP = Layout(
    "transformers CLIP, SigLIP",
    f"{_VISION}encoder.layers.0.self_attn.q_proj.weight",
    rules(
        ("(?:siglip.|clip.)?text_model.~", None),
        ("(?:text_projection|visual_projection|logit_scale|logit_bias)(?:.weight)?", None),
        ("classifier.*", "head.$"),
        (f"{_VISION}embeddings.class_embedding", "cls_token"),
        (f"{_VISION}embeddings.patch_embedding.*", "patch_embed.proj.$"),
        (f"{_VISION}embeddings.position_embedding.weight", "pos_embed"),
        (f"{_VISION}embeddings.position_ids", None),
        (f"{_VISION}pre_layrnorm.*", "norm_pre.$"),
        (f"{_VISION}encoder.layers.@.self_attn.q_proj.*", r"blocks.\1.attn.qkv.$#0"),
        (f"{_VISION}encoder.layers.@.self_attn.k_proj.*", r"blocks.\1.attn.qkv.$#1"),
        (f"{_VISION}encoder.layers.@.self_attn.v_proj.*", r"blocks.\1.attn.qkv.$#2"),
        (f"{_VISION}encoder.layers.@.self_attn.out_proj.*", r"blocks.\1.attn.proj.$"),
        (f"{_VISION}encoder.layers.@.layer_norm@.*", r"blocks.\1.norm\2.$"),
        (f"{_VISION}encoder.layers.@.mlp.fc@.*", r"blocks.\1.mlp.fc\2.$"),
        (f"{_VISION}post_layernorm.*", "norm.$"),
        (f"{_VISION}head.probe", "attn_pool.latent"),
        (f"{_VISION}head.attention.in_proj_(?P<kind>weight|bias)", "attn_pool.in_proj_$"),
        (f"{_VISION}head.attention.out_proj.*", "attn_pool.proj.$"),
        (f"{_VISION}head.layernorm.*", "attn_pool.norm.$"),
        (f"{_VISION}head.mlp.fc@.*", r"attn_pool.mlp.fc\1.$"),
    ),
    _of_clip,
)

LAYOUTS = (_VIT, _DINOV3, _SWIN, _CONVNEXT, _CLIP)
