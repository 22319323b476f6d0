"""Compacter (Mahabadi et al. 2021, arXiv 2106.04647): bottlenecks whose weights are sums of Kronecker products.

Letters: D width, r bottleneck, n factors, i input and o output features of a layer divided by n; leading dimensions
are batch and tokens, (B, T) or (B, H, W).
"""

from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.weights import weight_of


class Compacter(Method):
    """h + A(h) on the output h of attention and of the MLP: n^3 + 2*L*(2*(D + r) + r + D) parameters.

    A(h) = up(gelu(down(h))), before h is added to the stream; both weights are sum_k A_k (x) s_k t_k^T with the n
    matrices A_k (n, n) shared by all. The paper's reduction by 32 gives the bottleneck of 24 at its width of 768. h is
    taken after LayerScale and drop-path. The norms, which the paper trains too, stay frozen: "compacter+norm" trains
    them.
    """

    class Config(Options):
        bottleneck: int = Field(default=24, ge=1, description="Width of the bottleneck.")
        num_factors: int = Field(default=4, ge=1, description="Kronecker products summed per weight.")

        @model_validator(mode="after")
        def _whole_factors(self) -> Self:
            if self.bottleneck % self.num_factors:
                what = f"bottleneck ({self.bottleneck}) must be a multiple of num_factors ({self.num_factors})"
                raise ValueError(what)
            return self

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        factors = self.config.num_factors
        for block in anatomy.blocks:
            if block.width % factors:
                raise BackboneError(
                    "compacter's num_factors must divide the width of every block",
                    given=f"num_factors {factors}, width {block.width}",
                    do="choose another num_factors",
                )
        blocks = anatomy.attention_blocks
        widths = [block.width for block in blocks for _ in range(2)]
        ends = [end for block in blocks for end in (block.attn_branch_end, block.mlp_branch_end)]
        adapters = KroneckerBottlenecks(widths, self.config.bottleneck, factors)
        edits = Edits(model)
        edits.insert("remap_compacter", adapters, weight_of(model, blocks[0].projections["fc1"]))
        for index, end in enumerate(ends):
            edits.after(end, partial(adapters.change_output, index))
        return Attachment(edits)


class KroneckerBottlenecks(nn.Module):
    """All adapters of a model and the matrices they share."""

    def __init__(self, widths: list[int], bottleneck: int, factors: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(factors, factors, factors) * factors**-0.5)
        self.down = nn.ModuleList(KroneckerLinear(width, bottleneck, factors) for width in widths)
        self.up = nn.ModuleList(KroneckerLinear(bottleneck, width, factors) for width in widths)
        for layer in self.up.children():
            assert isinstance(layer, KroneckerLinear)
            nn.init.zeros_(layer.left)  # 0 at the start; the other factors are not, so that all can move

    def change_output(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of site ``index``: (..., D) to (..., D)."""
        hidden = F.gelu(self.down[index](output, self.shared))
        return output + self.up[index](hidden, self.shared)


class KroneckerLinear(nn.Module):
    """W x + b with W = sum_k A_k (x) s_k t_k^T; ``left`` holds the n vectors s_k (o,), ``right`` the t_k (i,)."""

    def __init__(self, inputs: int, outputs: int, factors: int) -> None:
        super().__init__()
        # With A_k of variance 1/n the whole weight starts with Xavier's variance, 2 / (inputs + outputs).
        std = (2 / (inputs + outputs)) ** 0.25
        self.left = nn.Parameter(torch.randn(factors, outputs // factors) * std)
        self.right = nn.Parameter(torch.randn(factors, inputs // factors) * std)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, shared_nnn: Tensor) -> Tensor:
        outer_noi = self.left.unsqueeze(2) * self.right.unsqueeze(1)
        # Row a*o + j, column b*i + k of a Kronecker product is A[a, b] * outer[j, k].
        weight = torch.einsum("nab,noi->aobi", shared_nnn, outer_noi).flatten(2).flatten(0, 1)
        return F.linear(x, weight, self.bias)
