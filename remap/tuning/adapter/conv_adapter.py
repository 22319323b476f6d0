"""Conv-Adapter (Chen et al. 2022, arXiv 2208.07463): a bottleneck of convolutions beside every spatial convolution.

Letters: B batch, H and W rows and columns, i input and o output channels, k kernel, r width of the bottleneck.
"""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.tuning.adapter.residual import conv_layers, require_sites
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.weights import registered


class ConvAdapter(Method):
    """conv(x) + a * up(relu(down(x))), the scheme "convolution parallel" of section 3.3: k*k*i + r*o + o parameters.

    ``down`` has the kernel, stride and padding of the convolution and takes i to r channels in r groups; ``up`` is a
    1x1 convolution; a scales every channel. a is zero at the start here, so that tuning begins at the pretrained
    network.
    """

    class Config(Options):
        reduction: int = Field(
            default=4, ge=1, description="Input channels per channel of the bottleneck; r is the next divisor below."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        for site, layer, path in conv_layers(model, anatomy, "remap_conv_adapter"):
            adapter = edits.insert(path, Bottleneck(layer, self.config.reduction), registered(layer, "weight"))
            edits.after(site.conv, adapter.change_output, first=True)
        require_sites(edits.added, model)
        return Attachment(edits)


class Bottleneck(nn.Module):
    """The adapter of one convolution, (B, i, H, W) to (B, o, H', W')."""

    def __init__(self, layer: nn.Conv2d, reduction: int) -> None:
        super().__init__()
        i, o = layer.in_channels, layer.out_channels
        r = next(width for width in range(max(1, i // reduction), 0, -1) if i % width == 0)
        shape = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation")}
        self.down = nn.Conv2d(i, r, **shape, groups=r, bias=False)
        self.up = nn.Conv2d(r, o, 1, bias=False)
        self.scale = nn.Parameter(layer.weight.new_zeros(o, 1, 1))

    def forward(self, x_BiHW: Tensor) -> Tensor:
        return self.scale * self.up(F.relu(self.down(x_BiHW)))

    def change_output(self, layer: nn.Module, args: tuple, output_BoHW: Tensor) -> Tensor:
        """Forward hook of the convolution."""
        return output_BoHW + self(args[0])
