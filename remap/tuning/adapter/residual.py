"""Residual adapters for convolutional networks (Rebuffi et al. 2017 and 2018, arXiv 1705.08045 and 1803.10082).

Letters: B batch, H and W rows and columns, i input and o output channels, G groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, ConvBlock, ConvSite, module_at
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Fold, Method, Options
from remap.tuning.weights import registered


class ResidualAdapter(Method):
    """A 1x1 convolution C for every spatial convolution of the blocks, and the norm behind it as the task's own.

    ``parallel``: norm(conv(x) + C x). ``series``: y + C bn(y) with y = conv(x), then the norm; bn normalises without
    scale and shift, because C scales and the norm behind takes a shift away. C is zero at the start, so that tuning
    starts at the pretrained network.

    The norm behind the convolution trains as in the papers: scale and shift by gradient, and a batch norm's running
    statistics follow the training images. All other norms stay frozen, statistics included.

    C is grouped like its convolution: in ResNeXt it mixes the channels of a group, in ConvNeXt it is a scale for
    every channel. Such a C folds into the centre of the kernel (parallel) or into the kernel (series).
    """

    class Config(Options):
        place: Literal["parallel", "series"] = Field(
            default="parallel", description="Parallel to a spatial convolution, or after it."
        )
        dense: bool = Field(default=False, description="Mix all channels of grouped convolutions; not mergeable.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        kind = Parallel if self.config.place == "parallel" else Series
        sites: list[Site] = []
        edits = Edits(model)
        norms: list[str] = []
        for conv, layer, path in conv_layers(model, anatomy, "remap_residual_adapter"):
            adapter = kind(layer, groups=1 if self.config.dense else layer.groups)
            edits.insert(path, adapter, registered(layer, "weight"))
            # In front of what others do with the output: a scale acts on the sum.
            edits.after(conv.conv, adapter.change_output, first=True)
            sites.append(Site(adapter, layer, None if conv.norm is None else module_at(model, conv.norm)))
            norms += [] if conv.norm is None else [conv.norm]
        require_sites(sites, model)
        of_norms = [f"{norm}.{name}" for norm in norms for name, _ in module_at(model, norm).named_parameters()]
        folds = all(site.adapter.folds_into(site.layer, site.norm) for site in sites)
        fold = Fold(partial(_fold, sites), stage=1) if folds else None
        return Attachment(edits, trainable=[*edits.parameters(), *of_norms], tuned_modules=norms, fold=fold)


def conv_layers(model: nn.Module, anatomy: Anatomy, name: str) -> Iterator[tuple[ConvSite, nn.Conv2d, str]]:
    """Yield the spatial convolutions of all blocks, with a path for a module ``name`` that belongs to each."""
    for block in anatomy.blocks:
        for site in block.convs if isinstance(block, ConvBlock) else ():
            layer = module_at(model, site.conv)
            assert isinstance(layer, nn.Conv2d)
            # In a network that is read by its stages, what holds the layer may run all that it holds.
            inside = anatomy.in_stages
            path = f"{site.conv}.{name}" if inside else f"{block.block}.{name}_{site.conv.rpartition('.')[2]}"
            yield site, layer, path


def require_sites(sites: Sequence[object], model: nn.Module) -> None:
    """Raise a BackboneError for a network without a convolution that an adapter can stand beside."""
    if not sites:
        raise BackboneError(
            f"{type(model).__name__} has no plain spatial convolution behind its stem",
            do="take lora or ssf, which change linear layers and convolutions of all kinds",
        )


class Parallel(nn.Module):
    """conv(x) + C x."""

    def __init__(self, layer: nn.Conv2d, groups: int) -> None:
        super().__init__()
        down, right = layer.stride
        self.conv = nn.Conv2d(layer.in_channels, layer.out_channels, 1, (down, right), groups=groups, bias=False)
        nn.init.zeros_(self.conv.weight)

    def change_output(self, layer: nn.Module, args: tuple, output_BoHW: Tensor) -> Tensor:
        """Forward hook of the spatial convolution."""
        return output_BoHW + self.conv(args[0])

    def folds_into(self, layer: nn.Conv2d, norm: nn.Module | None) -> bool:
        return self.conv.groups == layer.groups

    def fold(self, layer: nn.Conv2d, norm: nn.Module | None) -> None:
        weight = registered(layer, "weight")
        rows, columns = (size // 2 for size in layer.kernel_size)
        weight[:, :, rows, columns] += self.conv.weight[:, :, 0, 0]


class Series(nn.Module):
    """y + C bn(y) with y = conv(x)."""

    def __init__(self, layer: nn.Conv2d, groups: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(layer.out_channels, affine=False)
        self.conv = nn.Conv2d(layer.out_channels, layer.out_channels, 1, groups=groups, bias=False)
        nn.init.zeros_(self.conv.weight)

    def change_output(self, layer: nn.Module, args: tuple, output_BoHW: Tensor) -> Tensor:
        """Forward hook of the spatial convolution."""
        return output_BoHW + self.conv(self.norm(output_BoHW))

    def folds_into(self, layer: nn.Conv2d, norm: nn.Module | None) -> bool:
        takes_shift = layer.bias is not None or isinstance(norm, nn.BatchNorm2d)
        return self.conv.groups == layer.groups and takes_shift

    def fold(self, layer: nn.Conv2d, norm: nn.Module | None) -> None:
        """Write C bn(y) = M y - M m into the layer: its output channels are mixed by I + M, and -M m is a shift."""
        mean_o, variance_o = self.norm.running_mean, self.norm.running_var
        assert mean_o is not None and variance_o is not None
        groups, inverse_o = layer.groups, (variance_o.double() + self.norm.eps).rsqrt()
        mix_Goo = self.conv.weight.double().unflatten(0, (groups, -1)).flatten(2)
        mix_Goo = mix_Goo * inverse_o.unflatten(0, (groups, 1, -1))

        def mixed(tensor: Tensor) -> Tensor:
            """Apply M to the first dimension."""
            return (mix_Goo @ tensor.double().reshape(*mix_Goo.shape[:2], -1)).view_as(tensor)

        shift_o = -mixed(mean_o)
        weight = registered(layer, "weight")
        weight.copy_(weight.double() + mixed(weight))
        if layer.bias is not None:
            bias = registered(layer, "bias")
            bias.copy_(bias.double() + mixed(bias) + shift_o)
        else:
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
            # The scale of ssf acts on the sum: it is folded into the layer's weight later, and not into this shift.
            scale = getattr(layer, "remap_ssf", None)
            shift_o = shift_o if scale is None else shift_o * scale.gamma
            norm.running_mean.copy_(norm.running_mean.double() - shift_o)


@dataclass(frozen=True)
class Site:
    """An adapter, the convolution it belongs to, and the norm behind that (None where none follows directly)."""

    adapter: Parallel | Series
    layer: nn.Conv2d
    norm: nn.Module | None


def _fold(sites: list[Site]) -> None:
    for site in sites:
        site.adapter.fold(site.layer, site.norm)
