"""The anatomy of timm's plain vision transformers, against the facts timm itself states of them."""

import pytest
import timm
import torch
from torch import nn

from remap.backbones.anatomy import anatomy_of, classifier_parameters, module_at

# name, prefix tokens, class token, family trait: timm's documentation of each model.
FAMILIES = [
    ("vit_tiny_patch16_224", 1, True),
    ("deit_tiny_distilled_patch16_224", 2, True),
    ("vit_small_patch14_reg4_dinov2", 5, True),
    ("vit_small_patch14_dinov2", 1, True),
    ("vit_base_patch32_clip_224", 1, True),
    ("vit_base_patch16_siglip_224", 0, False),
    ("deit3_small_patch16_224", 1, True),
    ("vit_mini_student_patch4_32", 1, True),
]


def _meta(name: str, **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=3, **kwargs)


@pytest.mark.parametrize(("name", "prefix", "has_class"), FAMILIES)
def test_shapes_and_prefix_tokens(name: str, prefix: int, has_class: bool) -> None:
    model = _meta(name)
    anatomy = anatomy_of(model)
    assert (anatomy.num_prefix_tokens, anatomy.has_class_token) == (prefix, has_class)
    assert (anatomy.width, anatomy.depth) == (model.embed_dim, len(model.blocks))
    assert anatomy.num_patches == model.patch_embed.num_patches
    assert anatomy.heads * anatomy.head_dim == anatomy.width
    with torch.device("meta"):
        tokens = model.forward_features(torch.zeros(1, 3, *anatomy.image_size))
    assert tokens.shape == (1, prefix + anatomy.num_patches, anatomy.width)


@pytest.mark.parametrize(("name", "prefix", "has_class"), FAMILIES)
def test_every_path_leads_to_a_module_of_the_right_kind(name: str, prefix: int, has_class: bool) -> None:
    model = _meta(name)
    anatomy = anatomy_of(model)
    for block in anatomy.blocks:
        assert module_at(model, block.projections["q"].path).out_features == 3 * anatomy.width
        assert module_at(model, block.proj).out_features == anatomy.width
        assert module_at(model, block.fc1).out_features == anatomy.mlp_hidden
        assert module_at(model, block.fc2).in_features == anatomy.mlp_hidden
        for path in (block.norm1, block.norm2):
            assert isinstance(module_at(model, path), nn.LayerNorm)
    assert isinstance(module_at(model, anatomy.final_norm), nn.LayerNorm)


def test_the_classifier_is_told_from_the_backbone() -> None:
    model = _meta("deit_tiny_distilled_patch16_224")
    names = set(classifier_parameters(model, anatomy_of(model)))
    assert names == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
