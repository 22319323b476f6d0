"""Residual adapters for convolutional networks (Rebuffi et al. 2017 and 2018, arXiv 1705.08045 and 1803.10082).

Letters: B batch, H and W rows and columns, i input and o output channels, G groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, ConvSite, module_at
from remap.tuning.adapter.bottleneck import insert_adapter
from remap.tuning.base import Attached, Method, Options, inserted_parameters, vectors
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
        """Options."""

        place: Literal["parallel", "series"] = Field(
            default="parallel", description="Parallel to a spatial convolution, or after it."
        )
        dense: bool = Field(default=False, description="Mix all channels of grouped convolutions; not mergeable.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        cls = Parallel if self.config.place == "parallel" else Series
        sites: list[Site] = []
        handles: list[RemovableHandle] = []
        for block in anatomy.blocks:
            for conv in block.convs:
                layer = module_at(model, conv.conv)
                name = f"remap_residual_adapter_{conv.conv.rpartition('.')[2]}"
                adapter = cls(layer, groups=1 if self.config.dense else layer.groups)
                path = insert_adapter(model, block, name, adapter, conv.conv)
                # In front of what others do with the output: a scale acts on the sum.
                handles.append(layer.register_forward_hook(adapter.change_output, prepend=True))
                sites.append(Site(path, conv))
        return ResidualAttached(model, anatomy, sites, handles)


@dataclass(frozen=True)
class Site:
    """The path of an adapter and the convolution it belongs to."""

    adapter: str
    conv: ConvSite


class Parallel(nn.Module):
    """conv(x) + C x."""

    def __init__(self, layer: nn.Conv2d, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride, groups=groups, bias=False)
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
        """With C bn(y) = M y - M m: the kernel's output channels are mixed by I + M, and -M m is a shift."""
        groups, inverse_o = layer.groups, (self.norm.running_var.double() + self.norm.eps).rsqrt()
        mix_Goo = self.conv.weight.double().unflatten(0, (groups, -1)).flatten(2)
        mix_Goo = mix_Goo * inverse_o.unflatten(0, (groups, 1, -1))

        def mixed(tensor: Tensor) -> Tensor:
            """M applied to the first dimension."""
            return (mix_Goo @ tensor.double().reshape(*mix_Goo.shape[:2], -1)).view_as(tensor)

        shift_o = -mixed(self.norm.running_mean)
        weight = registered(layer, "weight")
        weight.copy_(weight.double() + mixed(weight))
        if layer.bias is not None:
            bias = registered(layer, "bias")
            bias.copy_(bias.double() + mixed(bias) + shift_o)
        else:
            norm.running_mean.copy_(norm.running_mean.double() - shift_o)


class ResidualAttached(Attached):
    """Trains the adapters and the norms behind their convolutions."""

    fold_stage = 1

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, sites: list[Site], handles: Iterable[RemovableHandle]
    ) -> None:
        self.sites = sites
        added = [site.adapter for site in sites]
        norms = [site.conv.norm for site in sites if site.conv.norm is not None]
        parameters = inserted_parameters(model, added)
        of_norms = {f"{norm}.{name}": p for norm in norms for name, p in module_at(model, norm).named_parameters()}
        super().__init__(
            model,
            anatomy,
            trainable=[*parameters, *of_norms],
            no_decay=vectors({**parameters, **of_norms}),
            mergeable=all(
                module_at(model, site.adapter).folds_into(*_layer_and_norm(model, site.conv)) for site in sites
            ),
            tuned_modules=norms,
            added=added,
            handles=handles,
        )

    def _fold(self) -> None:
        for site in self.sites:
            module_at(self.model, site.adapter).fold(*_layer_and_norm(self.model, site.conv))


def _layer_and_norm(model: nn.Module, conv: ConvSite) -> tuple[nn.Conv2d, nn.Module | None]:
    return module_at(model, conv.conv), module_at(model, conv.norm) if conv.norm is not None else None
