"""Residual networks: ResNet, ResNeXt, wide and squeeze-and-excitation variants."""

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, ConvBlock, ConvSite
from remap.backbones.families.base import Family
from remap.backbones.families.reading import configured_image_size, exactly, real, run_blocks, size_of_convolutions
from remap.backbones.families.stages import matrix_of
from remap.backbones.typed import as_timm, submodule

STAGES = ("layer1", "layer2", "layer3", "layer4")


class ResNet(Family[TimmResNet]):
    """timm's ``ResNet`` with basic or bottleneck blocks. Blocks take and give (B, D, H, W)."""

    name = "resnet"

    def matches(self, model: nn.Module) -> bool:
        return exactly(model, TimmResNet) and all(
            exactly(block, BasicBlock, Bottleneck) for stage in STAGES for block in getattr(model, stage)
        )

    def read(self, model: TimmResNet) -> Anatomy:
        image = configured_image_size(model)
        strides = {info["module"]: info["reduction"] for info in as_timm(model).feature_info}
        blocks = tuple(
            # Every convolution and pooling rounds up.
            _read_block(model, stage, index, (-(-image[0] // strides[name]), -(-image[1] // strides[name])))
            for stage, name in enumerate(STAGES)
            for index in range(len(getattr(model, name)))
        )
        stem_norms = [
            path
            for stem in ("conv1", "bn1", "maxpool")
            for path, module in model.named_modules()
            if (path == stem or path.startswith(f"{stem}.")) and is_norm(module)
        ]
        return Anatomy(
            family=self.name,
            width=model.head_hidden_size,
            depth=len(blocks),
            image_size=image,
            patch_size=(strides["layer1"], strides["layer1"]),
            grid=blocks[-1].grid,
            input_module="conv1",
            embedding_norms=tuple(stem_norms),
            final_norm=None,
            classifier_heads=("fc",),
            blocks=blocks,
        )

    def size_arguments(self, model: TimmResNet, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        return size_of_convolutions(model, image_size)

    def rest_of_forward(self, model: TimmResNet, index: int, x: Tensor) -> Tensor:
        blocks = [block for stage in STAGES for block in getattr(model, stage)]
        return run_blocks(blocks[index:], x, model.grad_checkpointing)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm: batch norm in nearly all of them, group norm in a few."""
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)


def _read_block(model: nn.Module, stage: int, index: int, grid: tuple[int, int]) -> ConvBlock:
    block = f"{STAGES[stage]}.{index}"
    module = model.get_submodule(block)
    assert isinstance(module, BasicBlock | Bottleneck)
    numbers = (1, 2, 3) if isinstance(module, Bottleneck) else (1, 2)
    last = numbers[-1]
    downsample = () if module.downsample is None else submodule(module, "downsample", nn.Sequential)
    shortcut = [f"{block}.downsample.{i}" for i, part in enumerate(downsample) if is_norm(part)]
    # What is added to the shortcut comes from the last of these that is there.
    ends = [f"bn{last}"] + [name for name in ("se", "drop_path") if getattr(module, name) is not None]
    return ConvBlock(
        block=block,
        width=getattr(module, f"conv{last}").out_channels,
        grid=grid,
        stage=stage,
        norms=(*real(model, (f"{block}.bn{n}" for n in numbers)), *shortcut),
        projections=dict(item for n in numbers for item in matrix_of(model, f"{block}.conv{n}").items()),
        channels_last=False,
        convs=tuple(
            ConvSite(f"{block}.conv{n}", f"{block}.bn{n}")
            for n in numbers
            if getattr(module, f"conv{n}").kernel_size != (1, 1)
        ),
        branch_end=f"{block}.{ends[-1]}",
    )
