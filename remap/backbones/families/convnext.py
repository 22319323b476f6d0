"""ConvNeXt and ConvNeXt V2."""

from typing import Any

from timm.layers import GlobalResponseNormMlp, Mlp
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, ConvBlock, ConvSite
from remap.backbones.families.base import Family
from remap.backbones.families.reading import (
    configured_image_size,
    exactly,
    mlp_projections,
    real,
    rest_of_stages,
    size_of_convolutions,
)
from remap.backbones.families.stages import matrix_of
from remap.backbones.typed import as_timm, submodule


class ConvNeXt(Family[TimmConvNeXt]):
    """timm's ``ConvNeXt``: a depthwise convolution, a norm and an MLP a block. Blocks take and give (B, D, H, W).

    The linear layers of the MLP may be 1x1 convolutions.
    """

    name = "convnext"

    def matches(self, model: nn.Module) -> bool:
        return exactly(model, TimmConvNeXt) and all(
            exactly(block, ConvNeXtBlock)
            and exactly(block.mlp, Mlp, GlobalResponseNormMlp)
            and isinstance(block.shortcut, nn.Identity)
            for stage in _stages(model)
            for block in stage.blocks
        )

    def read(self, model: TimmConvNeXt) -> Anatomy:
        image = configured_image_size(model)
        strides = [int(info["reduction"]) for info in as_timm(model).feature_info]
        blocks = tuple(
            _read_block(
                model,
                stage,
                index,
                (_positions(model, image[0], strides[stage]), _positions(model, image[1], strides[stage])),
            )
            for stage, layer in enumerate(_stages(model))
            for index in range(len(layer.blocks))
        )
        stem_norm = f"stem.{len(submodule(model, 'stem', nn.Sequential)) - 1}"
        final_norm = next(iter(real(model, ("norm_pre", "head.norm"))), None)
        downsamples = (f"stages.{stage}.downsample.0" for stage in range(len(strides)))
        return Anatomy(
            family=self.name,
            width=model.head_hidden_size,
            depth=len(blocks),
            mlp_hidden=blocks[-1].projections["fc1"].stop,
            image_size=image,
            patch_size=(strides[0], strides[0]),
            grid=blocks[-1].grid,
            input_module="stem",
            embedding_norms=real(model, (stem_norm, *downsamples)),
            final_norm=final_norm,
            classifier_heads=("head.fc",),
            blocks=blocks,
        )

    def size_arguments(self, model: TimmConvNeXt, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        return size_of_convolutions(model, image_size)

    def rest_of_forward(self, model: TimmConvNeXt, index: int, x: Tensor) -> Tensor:
        return model.norm_pre(rest_of_stages(_stages(model), index, x))


def _stages(model: TimmConvNeXt) -> list[ConvNeXtStage]:
    return [submodule(model, f"stages.{index}", ConvNeXtStage) for index in range(len(model.stages))]


def _positions(model: TimmConvNeXt, side: int, stride: int) -> int:
    """Return the rows (or columns) behind layers that together shrink ``side`` pixels by ``stride``.

    The stems of convolutions that overlap are padded and round up; all later layers round down.
    """
    stem = int(as_timm(model).feature_info[0]["reduction"])
    overlaps = submodule(model, "stem.0", nn.Conv2d).padding != (0, 0)
    return (-(-side // stem) if overlaps else side // stem) // (stride // stem)


def _read_block(model: TimmConvNeXt, stage: int, index: int, grid: tuple[int, int]) -> ConvBlock:
    block = f"stages.{stage}.blocks.{index}"
    return ConvBlock(
        block=block,
        width=submodule(model, f"{block}.conv_dw", nn.Conv2d).out_channels,
        grid=grid,
        stage=stage,
        norms=real(model, (f"{block}.norm",)),
        projections={**mlp_projections(model, f"{block}.mlp"), **matrix_of(model, f"{block}.conv_dw")},
        channels_last=False,
        convs=(ConvSite(f"{block}.conv_dw", f"{block}.norm"),),
        branch_end=f"{block}.drop_path",
    )
