"""HiRA (Huang et al. 2025, ICLR, openreview TwJrTz9cRS): a low-rank matrix multiplied into the weight elementwise.

Letters: i input and o output features of a layer, r rank.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import Attachment, Method, Options
from remap.tuning.layers import LayerTargets, layers_of
from remap.tuning.parameter.peft_layer import SharedLinear, attach_changes, shared_linears
from remap.tuning.weights import require_rank


class HiRA(Method):
    """W' = W + W * (B A), an elementwise product with the frozen weight: a change of high rank.

    L*4*D*r parameters on fused q, k, v. Tensors are named as peft names them. The embedded default trains it, so it
    does without peft, which takes over a second to import in each process.
    """

    class Config(Options):
        rank: int = Field(default=8, ge=1, description="Rank of the matrix that multiplies the weight.")
        targets: LayerTargets = None

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        layers, rank = layers_of(anatomy, self.config.targets), self.config.rank
        linears = shared_linears(model, layers)
        for layer, linear in zip(layers, linears, strict=True):
            shape = (linear.out_features, linear.in_features)
            require_rank(rank, min(shape), layer.path, shape)
        return attach_changes(model, "remap_hira", layers, [ElementwiseProduct(linear, rank) for linear in linears])


class ElementwiseProduct(nn.Module):
    """The change of one layer; B is zero at first, so that there is none."""

    def __init__(self, base_layer: SharedLinear, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        a_ri = nn.Parameter(torch.empty(rank, base_layer.in_features))
        nn.init.kaiming_uniform_(a_ri, a=math.sqrt(5))
        self.hira_A = nn.ParameterDict({"default": a_ri})
        self.hira_B = nn.ParameterDict({"default": torch.zeros(base_layer.out_features, rank)})

    def forward(self, x: Tensor, **bias: Tensor) -> Tensor:
        """Map (..., i) to (..., o) in one product; peft computes W x and (W * B A) x."""
        weight_oi, factor_oi = self.base_layer.weight, self.hira_B["default"] @ self.hira_A["default"]
        return self.base_layer(x, weight=torch.addcmul(weight_oi, weight_oi, factor_oi.to(weight_oi.dtype)), **bias)
