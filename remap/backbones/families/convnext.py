"""ConvNeXt and ConvNeXt V2."""

from typing import Any

from timm.layers import GlobalResponseNormMlp, Mlp
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, ConvBlock, ConvSite
from remap.backbones.families.base import (
    Family,
    configured_image_size,
    exactly,
    mlp_projections,
    real,
    size_of_convolutions,
)
from remap.backbones.families.swin import rest_of_stages


class ConvNeXt(Family):
    """timm's ``ConvNeXt``: a depthwise convolution, a norm and an MLP a block, whose linear layers may be 1x1
    convolutions. Blocks take and give (B, D, H, W)."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return exactly(model, TimmConvNeXt) and all(
            exactly(block, ConvNeXtBlock)
            and exactly(block.mlp, Mlp, GlobalResponseNormMlp)
            and isinstance(block.shortcut, nn.Identity)
            for stage in model.stages
            for block in stage.blocks
        )

    @classmethod
    def read(cls, model: nn.Module) -> Anatomy:
        image = configured_image_size(model)
        strides = [info["reduction"] for info in model.feature_info]
        blocks = tuple(
            _read_block(model, stage, index, tuple(_positions(model, side, strides[stage]) for side in image))
            for stage in range(len(model.stages))
            for index in range(len(model.stages[stage].blocks))
        )
        stem_norm = f"stem.{len(model.stem) - 1}"
        final_norm = next(iter(real(model, ("norm_pre", "head.norm"))), None)
        downsamples = (f"stages.{stage}.downsample.0" for stage in range(len(model.stages)))
        return Anatomy(
            family="convnext",
            width=model.head_hidden_size,
            depth=len(blocks),
            heads=0,
            head_dim=0,
            mlp_hidden=blocks[-1].projections["fc1"].stop,
            image_size=image,
            patch_size=(strides[0], strides[0]),
            grid=blocks[-1].grid,
            num_prefix_tokens=0,
            has_class_token=False,
            class_token_pooled=False,
            input_module="stem",
            block_input_norm=None,
            embedding_norms=real(model, (stem_norm, *downsamples)),
            final_norm=final_norm,
            classifier_heads=("head.fc",),
            blocks=blocks,
        )

    @classmethod
    def size_arguments(cls, model: nn.Module, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        return size_of_convolutions(model, image_size)

    @classmethod
    def rest_of_forward(cls, model: nn.Module, anatomy: Anatomy, index: int, x: Tensor) -> Tensor:
        return model.norm_pre(rest_of_stages(model.stages, index, x))


def _positions(model: nn.Module, side: int, stride: int) -> int:
    """Rows (or columns) behind layers that together shrink ``side`` pixels by ``stride``.

    The stems of convolutions that overlap are padded and round up; whatever follows rounds down.
    """
    stem, overlaps = model.feature_info[0]["reduction"], model.stem[0].padding != (0, 0)
    return (-(-side // stem) if overlaps else side // stem) // (stride // stem)


def _read_block(model: nn.Module, stage: int, index: int, grid: tuple[int, int]) -> ConvBlock:
    block = f"stages.{stage}.blocks.{index}"
    return ConvBlock(
        block=block,
        width=model.get_submodule(block).conv_dw.out_channels,
        grid=grid,
        stage=stage,
        norms=real(model, (f"{block}.norm",)),
        projections=mlp_projections(model, f"{block}.mlp"),
        channels_last=False,
        convs=(ConvSite(f"{block}.conv_dw", f"{block}.norm"),),
        branch_end=f"{block}.drop_path",
    )
