"""NaFlexViT: plain vision transformers with the embedding of flexible sizes (C-RADIO v3 and v4, SigLIP 2)."""

from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families.reading import configured_image_size, exactly, real
from remap.backbones.families.vit import PlainViT, has_standard_blocks, standard_block


class NaFlexViT(PlainViT):
    """timm's ``NaFlexVit`` with the standard block and learned positions, on images of one size.

    Blocks, attention and forward are those of ``PlainViT``; ``embeds`` holds patches, positions and prefix tokens.
    """

    name = "naflexvit"

    def matches(self, model: nn.Module) -> bool:
        return (
            exactly(model, NaFlexVit) and model.rope is None and model.patch_drop is None and has_standard_blocks(model)
        )

    def read(self, model: Any) -> Anatomy:
        image = model.embeds.default_img_size or configured_image_size(model)
        patch = tuple(model.embeds.patch_size)
        grid = (image[0] // patch[0], image[1] // patch[1])
        blocks = tuple(standard_block(model, f"blocks.{index}", grid) for index in range(len(model.blocks)))
        last = blocks[-1]
        final_norm = next(iter(real(model, ("norm", "fc_norm"))), None)
        outside = real(model, ("embeds.norm", "norm_pre", "norm", "attn_pool.norm", "fc_norm"))
        reads_class_token = final_norm == "norm" and model.attn_pool is None and model.global_pool == "token"
        return Anatomy(
            family=self.name,
            width=model.embed_dim,
            depth=len(blocks),
            heads=last.heads,
            head_dim=last.head_dim,
            mlp_hidden=last.mlp_hidden,
            image_size=image,
            patch_size=patch,
            grid=grid,
            num_prefix_tokens=model.num_prefix_tokens,
            has_class_token=model.has_class_token,
            class_token_pooled=reads_class_token,
            input_module="embeds",
            positions_in_embedding=True,
            embedding_norms=tuple(path for path in outside if path != final_norm),
            final_norm=final_norm,
            classifier_heads=("head",),
            blocks=blocks,
        )

    def unprunable(self, model: Any) -> str | None:
        return "its positions are a grid that is cropped in each forward"
