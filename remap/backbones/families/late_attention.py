"""Networks of stages whose later ones attend to the whole image: Hiera and TinyViT.

Letters: B batch, N tokens, H heads, h head width, E = H * h.
"""

from dataclasses import replace
from typing import Any

import torch
from timm.models.hiera import Hiera as TimmHiera
from timm.models.hiera import HieraBlock, MaskUnitAttention
from timm.models.tiny_vit import Attention, TinyVit, TinyVitBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionScores
from remap.backbones.families.base import KeepScores
from remap.backbones.families.generic import Generic
from remap.backbones.families.reading import configured_image_size, exactly
from remap.backbones.families.stages import StageBlock
from remap.errors import BackboneError


class _LateAttention(Generic):
    """Read by its stages as ``Generic`` does; the attention of a stage is that of its last block."""

    def read(self, model: Any) -> Anatomy:
        anatomy = super().read(model)
        stages = [block for block in anatomy.blocks if isinstance(block, StageBlock)]
        blocks = tuple(
            replace(stage, heads=heads, head_dim=head_dim)
            for stage, (heads, head_dim) in zip(stages, self._heads(model), strict=True)
        )
        return replace(anatomy, family=self.name, blocks=blocks)

    def _heads(self, model: Any) -> list[tuple[int, int]]:
        """Return the heads of each stage's last block and their width; 0 and 0 where it has no attention."""
        raise NotImplementedError

    def _no_attention(self, index: int, why: str) -> BackboneError:
        return BackboneError(
            f"stage {index} of a backbone of the family '{self.name}' has no attention over the whole image: {why}",
            allowed="its last stage (layers: last), at the image size that it was made for",
            do="compare that one, or leave attention out: use losses such as ce, kd or feature (--losses ce,kd)",
        )


class TinyViT(_LateAttention):
    """timm's ``TinyVit``: softmax(q k^T / sqrt(h) + b(|dy|, |dx|)) in windows, after a stage of convolutions.

    One window covers the maps of the last two stages at the image size that a model was made for. Smaller maps are
    padded to a window; the padding is cut here, as prompts and registers are, and each row's sum over what stays is 1.
    """

    name = "tiny_vit"

    def matches(self, model: nn.Module) -> bool:
        return exactly(model, TinyVit) and all(
            exactly(block, TinyVitBlock) and exactly(block.attn, Attention)
            for stage in [*model.stages][1:]
            for block in getattr(stage, "blocks", [None])
        )

    def _heads(self, model: Any) -> list[tuple[int, int]]:
        attentions = [stage.blocks[-1].attn for stage in model.stages[1:]]
        return [(0, 0), *((attention.num_heads, attention.key_dim) for attention in attentions)]

    def watch_attention(
        self, model: Any, index: int, keep: KeepScores, *, values: bool = False
    ) -> list[RemovableHandle]:
        if index == 0:
            raise self._no_attention(index, "it is made of convolutions")
        attention, stride = model.stages[index].blocks[-1].attn, model.feature_info[index]["reduction"]
        rows, columns = (-(-side // stride) for side in configured_image_size(model))
        height, width = attention.resolution
        if rows > height or columns > width:
            raise self._no_attention(index, f"{height} x {width} windows divide its {rows} x {columns} patches")

        def qkv_ready(_module: nn.Module, _args: tuple, qkv_BNE: Tensor) -> None:
            qkv_BHNh = qkv_BNE.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            inside_N = torch.arange(height * width, device=qkv_BNE.device).view(height, width)
            inside_N = inside_N[:rows, :columns].flatten()
            q, k, v = qkv_BHNh[:, :, inside_N].split([attention.key_dim, attention.key_dim, attention.val_dim], dim=-1)
            offsets_NN = attention.attention_bias_idxs[inside_N][:, inside_N]
            bias_HNN = attention.attention_biases[:, offsets_NN]
            keep(AttentionScores(q * attention.scale, k, bias_HNN, v if values else None))

        return [attention.qkv.register_forward_hook(qkv_ready)]


class Hiera(_LateAttention):
    """timm's ``Hiera``: softmax(q k^T / sqrt(h)), over the whole image behind the stages of mask units.

    Inside the network tokens stand in the order of its pooling; here they are put row by row.
    """

    name = "hiera"

    def matches(self, model: nn.Module) -> bool:
        return (
            exactly(model, TimmHiera)
            and not model.patch_drop_rate
            and all(exactly(block, HieraBlock) and exactly(block.attn, MaskUnitAttention) for block in model.blocks)
        )

    def _heads(self, model: Any) -> list[tuple[int, int]]:
        attentions = [model.blocks[end].attn for end in model.stage_ends]
        return [(attention.heads, attention.head_dim) for attention in attentions]

    def watch_attention(
        self, model: Any, index: int, keep: KeepScores, *, values: bool = False
    ) -> list[RemovableHandle]:
        end = model.stage_ends[index]
        attention = model.blocks[end].attn
        if attention.use_mask_unit_attn:
            raise self._no_attention(index, "its tokens attend to their mask unit")
        if attention.q_stride > 1:
            raise self._no_attention(index, "its only block pools the queries")

        def qkv_ready(_module: nn.Module, _args: tuple, qkv_BNE: Tensor) -> None:
            in_rows_BNE = model.reroll(qkv_BNE, end).flatten(1, 2)
            q, k, v = in_rows_BNE.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
            keep(AttentionScores(q * attention.scale, k, v_BHTh=v if values else None))

        return [attention.qkv.register_forward_hook(qkv_ready)]
