"""Weights of other libraries, on tiny random models: expected outputs are those of the other library's own forward."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from remap.backbones.build import build
from remap.backbones.checkpoints.open_clip import describe as describe_open_clip
from remap.backbones.checkpoints.transformers_config import describe
from remap.backbones.loading import Loaded, create
from remap.backbones.lookup import family_of_name
from remap.errors import WeightsError

SIDE = 32
PLAIN: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
SWIN: dict[str, Any] = {"image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "image_size": SIDE}

# By name: the model, its configuration, and the family of remap that reads it.
FOLDERS: dict[str, tuple[type[nn.Module], Any, str]] = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**PLAIN, **LABELS), "vit"),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**PLAIN, **LABELS), "vit"),
    "deit, two heads": (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**PLAIN, **LABELS), "vit"),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**PLAIN), "vit"),
    "dinov2, gated": (hf.Dinov2Model, hf.Dinov2Config(**PLAIN, use_swiglu_ffn=True), "vit"),
    "dinov2, registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**PLAIN), "vit"),
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**PLAIN, num_register_tokens=4), "eva"),
    "dinov3, gated": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**PLAIN, use_gated_mlp=True, hidden_act="silu"), "eva"),
    "beit": (
        hf.BeitForImageClassification,
        hf.BeitConfig(**PLAIN, **LABELS, use_relative_position_bias=True, layer_scale_init_value=0.1),
        "beit",
    ),
    "swin": (hf.SwinForImageClassification, hf.SwinConfig(**SWIN, **LABELS, window_size=4), "swin"),
    "convnext": (hf.ConvNextForImageClassification, hf.ConvNextConfig(**STAGES, **LABELS), "convnext"),
    "convnextv2": (hf.ConvNextV2ForImageClassification, hf.ConvNextV2Config(**STAGES, **LABELS), "convnext"),
    "clip": (hf.CLIPModel, hf.CLIPConfig(vision_config=PLAIN, text_config=TEXT), "vit"),
    "clip, classifier": (
        hf.CLIPForImageClassification,
        hf.CLIPConfig(vision_config=PLAIN, text_config=TEXT, **LABELS),
        "vit",
    ),
    "clip, vision": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**PLAIN), "vit"),
    "siglip, vision": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**PLAIN), "vit"),
    "siglip, classifier": (
        hf.SiglipForImageClassification,
        hf.SiglipConfig(vision_config=PLAIN, text_config=TEXT, **LABELS),
        "vit",
    ),
}


def _random(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _agree(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and float((found - expected).abs().max()) < 1e-5


@torch.no_grad()
def _theirs(model: Any, images: Tensor) -> Tensor:
    """The other library's logits, or without a classifier its pooled features."""
    if isinstance(model, hf.CLIPModel):
        return model.vision_model(pixel_values=images).pooler_output
    found = model(pixel_values=images)
    return found.logits if "logits" in found else found.pooler_output


@pytest.mark.parametrize(("kind", "config", "family"), FOLDERS.values(), ids=list(FOLDERS))
@torch.no_grad()
def test_a_folder_of_transformers(kind: Callable[..., nn.Module], config: Any, family: str, tmp_path: Path) -> None:
    model: Any = _random(lambda: kind(config))
    model.save_pretrained(tmp_path)
    name = f"local-dir:{tmp_path}"
    loaded = create(name, "pretrained", {})
    images = torch.randn(2, 3, SIDE, SIDE)
    _agree(loaded.model.eval()(images), _theirs(model, images))
    assert not loaded.missing and family_of_name(name) == family
    assert loaded.labels == (("ant", "bee", "cat") if "ForImage" in kind.__name__ else ())
    assert any("preprocessor_config.json is missing" in note for note in loaded.notes)
    # Version 5 names the tensors of many models differently in memory, as scripts save them, than in its files.
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again, expected = create(name, str(tmp_path / "own.pth"), {}).model.state_dict(), loaded.model.state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in expected)


def test_a_classifier_of_dinov2_stays_behind_and_the_backbone_serves(tmp_path: Path) -> None:
    """It reads the class token beside the mean of the patches: no model of timm gives both."""
    model: Any = _random(lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**PLAIN, **LABELS)))
    model.save_pretrained(tmp_path)
    built = build(f"local-dir:{tmp_path}", "pretrained", 5)
    assert built.model.head.weight.shape == (5, 32)
    with pytest.raises(Exception, match="bring no classifier"):
        build(f"local-dir:{tmp_path}", "pretrained", 3, keep_head=True)


def test_preprocessing_is_the_folders(tmp_path: Path) -> None:
    config = hf.ViTConfig(**PLAIN, **LABELS)
    _random(lambda: hf.ViTForImageClassification(config)).save_pretrained(tmp_path)  # type: ignore[operator]
    values = {
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_center_crop": True,
        "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    spec = build(f"local-dir:{tmp_path}", "pretrained", 3).preprocess
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (spec.size, spec.interpolation, spec.crop_pct) == (32, "bilinear", 0.8)


@pytest.mark.parametrize(("side", "share"), [(224, 0.875), (384, 1.0)])
def test_a_convnext_has_the_size_and_crop_of_its_processor(side: int, share: float) -> None:
    """As transformers' ConvNextImageProcessor: crop_pct below 384 pixels only. Published configs say 224 of all."""
    config = hf.ConvNextConfig(**{**STAGES, "image_size": 224}).to_dict()
    processor = {"crop_pct": 0.875, "do_normalize": False, "resample": 3, "size": {"shortest_edge": side}}
    found = describe(config, processor).config
    assert (found["input_size"], found["crop_pct"]) == ((3, side, side), share)


@pytest.mark.parametrize("kind", [hf.DeiTForImageClassification, hf.DeiTForImageClassificationWithTeacher])
def test_a_configuration_from_before_there_was_a_word_for_the_bias(kind: type) -> None:
    """The first DeiTConfig had no ``qkv_bias``; its queries, keys and values had one."""
    config = {**hf.DeiTConfig(**PLAIN).to_dict(), "architectures": [kind.__name__]}
    del config["qkv_bias"]
    assert describe(config, None).arguments["qkv_bias"] is True


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not one of vit"),
        ({"model_type": "vit", "hidden_size": 192, "hidden_act": "gelu"}, "lacks or misstates"),
        ({"model_type": "swin", "use_absolute_embeddings": True, "hidden_act": "gelu"}, "use_absolute_embeddings"),
        (
            {"model_type": "vit", **PLAIN, "hidden_act": "gelu", "layer_norm_eps": 0, "num_hidden_layers": 10**9},
            "larger",
        ),
    ],
)
def test_a_folder_of_transformers_that_timm_has_no_model_for(values: dict, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="model folder of transformers") as caught:
        create(f"local-dir:{tmp_path}", "pretrained", {})
    assert says in str(caught.value)


def _open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of open_clip (src/open_clip/transformer.py), written from those of transformers' CLIP."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "conv1",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {"visual.proj": torch.zeros(32, 8), "token_embedding.weight": torch.zeros(9, 8)}
    for key, tensor in tensors.items():
        name = key.removeprefix("vision_model.")
        for old, new in names.items():
            name = name.replace(old, new)
        if ".self_attn." not in name:
            found[f"visual.{name}"] = tensor
        elif ".q_proj." in name:
            three = [tensors[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"visual.{name.replace('self_attn.q_proj.', 'attn.in_proj_')}"] = torch.cat(three)
    return found


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_the_image_tower_of_a_folder_of_open_clip(quick: bool, tmp_path: Path) -> None:
    """Expected: transformers' CLIP with the same weights under its own names."""
    config = hf.CLIPVisionConfig(**PLAIN, hidden_act="quick_gelu" if quick else "gelu")
    model: Any = _random(lambda: hf.CLIPVisionModel(config))
    tower = {key.replace("vision_model.", ""): tensor for key, tensor in model.state_dict().items()}
    save_file(_open_clip(tower), tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": SIDE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, "mlp_ratio": 2.0}
    view = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    whole = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "quick_gelu": quick}, "preprocess_cfg": view}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    loaded = create(f"local-dir:{tmp_path}", "pretrained", {})
    images = torch.randn(2, 3, SIDE, SIDE)
    _agree(loaded.model.eval()(images), _theirs(model, images))
    assert build(f"local-dir:{tmp_path}", "pretrained", 3).preprocess.mean == (0.1, 0.2, 0.3)


def _towers_of_open_clip() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Towers whose pooling is not the one that timm's model has by itself, with their entries of the configuration."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OpenClipTower

    own: Any = _random(lambda: OpenClipTower(SIDE, 8, 32, 2, 2, 2.0, output_dim=8, pool_type="avg"))
    own.proj = None  # it is not part of the tower
    sizes = {"layers": 2, "width": 32, "patch_size": 8, "head_width": 16, "mlp_ratio": 2.0}
    return {
        "open_clip's, mean": (own, {**sizes, "image_size": SIDE, "pool_type": "avg"}),
        "timm's, mean": (
            _random(lambda: TimmModel("test_vit", 64, 160, pool="avg", proj="none")),
            {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "avg", "timm_proj": "none"},
        ),
    }


@pytest.mark.parametrize("tower", ["open_clip's, mean", "timm's, mean"])
@torch.no_grad()
def test_a_tower_of_open_clip_pools_as_its_configuration_says(tower: str, tmp_path: Path) -> None:
    model, vision = _towers_of_open_clip()[tower]
    save_file({f"visual.{key}": t for key, t in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    whole = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    images = torch.randn(2, 3, vision["image_size"], vision["image_size"])
    _agree(create(f"local-dir:{tmp_path}", "pretrained", {}).model.eval()(images), model(images))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"timm_model_name": "resnet18", "timm_pool": "abs_attn"}, "timm_pool 'abs_attn'"),
        ({"norm_kwargs": {"eps": 1e-6}}, "norm_kwargs"),
        ({"act_kwargs": {"approximate": "tanh"}}, "act_kwargs"),
    ],
)
def test_what_changes_a_tower_of_open_clip_is_refused(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        describe_open_clip({"model_cfg": {"vision_cfg": {"layers": 2, "width": 64, "patch_size": 8, **entry}}})


def test_the_second_name_of_a_vision_configuration_counts() -> None:
    """Older files of CLIP have both, and transformers takes this one where they differ."""
    values = {"model_type": "clip", "vision_config": {**PLAIN, "num_attention_heads": 4}, "vision_config_dict": PLAIN}
    ours = describe(values, None).arguments["num_heads"]  # first: transformers changes what it is given
    assert ours == hf.CLIPConfig(**values).vision_config.num_attention_heads == 2


NARROW = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
TORCHVISION: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "vit": (lambda: VisionTransformer(SIDE, 8, 2, 2, 32, 64, num_classes=5), "vit_base_patch16_224", NARROW),
    "swin": (
        lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5),
        "swin_tiny_patch4_window7_224",
        {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    "convnext": (
        lambda: ConvNeXt(
            [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 16, 2), CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)],
            num_classes=5,
        ),
        "convnext_tiny",
        {"dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1)},
    ),
    "resnet": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5), "resnet50", {"layers": (1, 1, 1, 1)}),
}


def _loaded(path: Path, architecture: str, arguments: dict[str, Any]) -> Loaded:
    return create(architecture, str(path), arguments)


@pytest.mark.parametrize(("make", "architecture", "arguments"), TORCHVISION.values(), ids=list(TORCHVISION))
@torch.no_grad()
def test_a_file_of_torchvision(
    make: Callable[[], nn.Module], architecture: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = _random(make)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = _loaded(tmp_path / "weights.pth", architecture, arguments)
    images = torch.randn(2, 3, SIDE, SIDE)
    _agree(loaded.model.eval()(images), model(images))
    assert loaded.model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)  # torchvision's presets


def test_a_layout_with_a_tensor_that_it_does_not_know(tmp_path: Path) -> None:
    """It would change the function, so it is not left out in silence."""
    tensors = VisionTransformer(SIDE, 8, 2, 2, 32, 64, num_classes=5).state_dict()
    torch.save({**tensors, "encoder.gate": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="a tensor that torchvision ViT does not have"):
        _loaded(tmp_path / "weights.pth", "vit_base_patch16_224", NARROW)


def test_the_file_of_transformers_goes_with_a_name_of_timm(tmp_path: Path) -> None:
    """Recognised by its keys alone, as another machine's pytorch_model.bin."""
    config = hf.ViTConfig(**PLAIN, **LABELS)
    model: Any = _random(lambda: hf.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    loaded = _loaded(tmp_path / "pytorch_model.bin", "vit_base_patch16_224", NARROW)
    expected = create(f"local-dir:{tmp_path}", "pretrained", {}).model.state_dict()
    found = loaded.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
