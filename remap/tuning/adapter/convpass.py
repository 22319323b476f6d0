"""Convpass (Jie and Deng 2022, arXiv 2207.07039): a bottleneck with a convolution beside attention and MLP.

Letters: B batch, T tokens, N patch tokens, h and w rows and columns of patches, D width, r bottleneck.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.adapter.bottleneck import Beside, insert_adapter
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.dropout import SampleDropout


class Convpass(Method):
    """x + attn(n) + s * up(dropout(act(conv3x3(act(down(n)))))): 2*L*(2*D*r + 9*r*r + 2*r + D) parameters.

    n is norm1(x); the same stands beside the MLP, with norm2; act is QuickGELU. The sum is outside LayerScale and
    drop-path.
    """

    class Config(Options):
        bottleneck: int = Field(default=8, ge=1, description="Width of the bottleneck.")
        scale: float = Field(default=1.0, gt=0.0, description="Factor on the output; 0.01 to 100 in the paper.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability in the bottleneck.")
        place: Literal["block", "attention"] = Field(
            default="block", description="Beside attention and MLP, or attention only."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        size = partial(_require_size, anatomy.image_size)
        edits.before(anatomy.input_module, size)
        for block in anatomy.attention_blocks:
            branches = [("attn", block.norm1, block.attn_branch_end), ("mlp", block.norm2, block.mlp_branch_end)]
            for word, norm, end in branches if self.config.place == "block" else branches[:1]:
                adapter = ConvBottleneck(block.width, block.grid, self.config, site=len(edits.added))
                insert_adapter(edits, block, f"remap_convpass_{word}", adapter)
                edits.after(norm, adapter.keep_output)
                edits.after(end, adapter.add_to_branch)
        return Attachment(edits)


class ConvBottleneck(Beside):
    """The adapter of one branch, (B, T, D) or (B, h, w, D) to the same shape.

    The last h*w tokens are the patches, with any number of tokens in front of them. Every other token (class,
    registers, prompts) is convolved as an image of one pixel: the other taps of the kernel see padding.
    """

    def __init__(self, width: int, grid: tuple[int, int], config: Convpass.Config, site: int) -> None:
        super().__init__()
        self.grid, self.scale, bottleneck = grid, config.scale, config.bottleneck
        self.down = nn.Linear(width, bottleneck)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.dropout = SampleDropout(config.dropout, site)
        self.up = nn.Linear(bottleneck, width)
        nn.init.xavier_uniform_(self.down.weight)
        assert self.conv.bias is not None
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        nn.init.dirac_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden_BTr = _quick_gelu(self.down(x.flatten(1, -2)))
        hidden_BTr = _quick_gelu(self._convolve(hidden_BTr))
        return (self.up(self.dropout(hidden_BTr)) * self.scale).view_as(x)

    def _convolve(self, hidden_BTr: Tensor) -> Tensor:
        others = hidden_BTr.shape[1] - self.grid[0] * self.grid[1]
        patches_Brhw = hidden_BTr[:, others:].mT.unflatten(2, self.grid)
        patches_BNr = self.conv(patches_Brhw).flatten(2).mT
        if others == 0:
            return patches_BNr
        centre_rr = self.conv.weight[:, :, 1, 1]
        return torch.cat([F.linear(hidden_BTr[:, :others], centre_rr, self.conv.bias), patches_BNr], dim=1)


def _require_size(size: tuple[int, int], _module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the module that takes the image: which tokens are patches depends on its size."""
    given = tuple(args[0].shape[-2:])
    if given != size:
        raise BackboneError(
            "convpass was attached for another image size",
            given=f"{given[0]}x{given[1]} pixels",
            allowed=f"{size[0]}x{size[1]}",
        )


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
