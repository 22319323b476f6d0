"""Tiny vision-language models on disk, random, in the layouts of the hub: written by open_clip and transformers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

TEXTS = "a photo of the blue green red big small ant bee hat cap thing colour picture it is . , !"
TEXT = {"width": 32, "heads": 2, "layers": 2}


@dataclass(frozen=True)
class Pair:
    """A model folder, and the library's own forward.

    Attributes:
        size: Of the images in pixels.
        logits: From normalised images (B, 3, size, size) and texts to logits (B, N), as the library computes them.
    """

    folder: Path
    size: int
    logits: Callable[[Tensor, list[str]], Tensor]

    @property
    def word(self) -> str:
        return f"clip:local-dir:{self.folder}"


def write_tokenizer(folder: Path, **options: Any) -> None:
    """A vocabulary of whole words, with an end token behind each text, as SigLIP's has."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *TEXTS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>", **options}))


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every parameter count: biases and norms start at 0 and 1."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return model.eval()


def open_clip_clip(folder: Path, *, quick_gelu: bool = False) -> Pair:
    """CLIP as open_clip writes it: its own image tower, the text tower at the root, CLIP's byte pairs."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 24, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": TEXT}
    torch.manual_seed(0)
    return _of_open_clip(folder, open_clip.CLIP(**config), config, 32, open_clip.SimpleTokenizer(context_length=77))


def open_clip_siglip(folder: Path, *, second: bool = False) -> Pair:
    """SigLIP, or SigLIP 2, as open_clip writes it: a tower of timm, the text tower below "text."."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    text = {
        **TEXT, "context_length": 16, "vocab_size": 40, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }  # fmt: skip
    if second:
        text["act_kwargs"] = {"approximate": "tanh"}
    vision = {
        "image_size": 160, "timm_model_name": "test_vit3", "timm_model_pretrained": False, "timm_pool": "map",
        "timm_proj": "none",
    }  # fmt: skip
    config = {"embed_dim": 96, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(1)
    model = open_clip.CustomTextCLIP(**config)
    folder.mkdir()
    write_tokenizer(folder, tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = HFTokenizer(str(folder), context_length=16, clean="canonicalize")
    return _of_open_clip(folder, model, {**config, "custom_text": True}, 160, tokenizer)


def _of_open_clip(folder: Path, model: Any, config: dict[str, Any], size: int, tokenizer: Any) -> Pair:
    shaken(model)
    folder.mkdir(exist_ok=True)
    view = {
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": view}))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")

    @torch.no_grad()
    def logits(images: Tensor, texts: list[str]) -> Tensor:
        return model.get_logits(images, tokenizer(texts))[0]

    return Pair(folder, size, logits)


def transformers_clip(folder: Path) -> Pair:
    """CLIP as transformers writes it; quick_gelu is its default."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
        "max_position_embeddings": 16, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(2)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    return _of_transformers(folder, model, 32, "CLIPTokenizer")


def transformers_siglip(folder: Path, *, second: bool = False) -> Pair:
    """SigLIP, or SigLIP 2 of a fixed size, as transformers writes it."""
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 40, "max_position_embeddings": 16}
    torch.manual_seed(3)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}))
    return _of_transformers(folder, model, 32, "Siglip2Tokenizer" if second else "SiglipTokenizer")


def _of_transformers(folder: Path, model: Any, size: int, tokenizer_class: str) -> Pair:
    from transformers import PreTrainedTokenizerFast

    shaken(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    view = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(view))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", padding_side="right"
    )
    write_tokenizer(folder, tokenizer_class=tokenizer_class)

    @torch.no_grad()
    def logits(images: Tensor, texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        return model(input_ids=ids, pixel_values=images).logits_per_image

    return Pair(folder, size, logits)


LAYOUTS: dict[str, Callable[[Path], Pair]] = {
    "open_clip CLIP": open_clip_clip,
    "open_clip CLIP, quick_gelu": lambda folder: open_clip_clip(folder, quick_gelu=True),
    "open_clip SigLIP": open_clip_siglip,
    "open_clip SigLIP 2": lambda folder: open_clip_siglip(folder, second=True),
    "transformers CLIP": transformers_clip,
    "transformers SigLIP": transformers_siglip,
    "transformers SigLIP 2": lambda folder: transformers_siglip(folder, second=True),
}
