"""MLAE (Wang et al. 2024, arXiv 2405.18897): masked rank-1 LoRA experts.

Letters: B images, T rows (all leading dimensions), i input and o output features of a layer, r experts.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.tuning.dropout import SampleDropout
from remap.tuning.parameter.layer_delta import LayerDelta
from remap.tuning.weights import Delta


class MLAE(LayerDelta):
    """W' = W + sum_k m_k lambda_k b_k a_k^T: r experts of rank 1 with learned coefficients.

    In training the mask m drops whole experts with probability ``dropout`` (the paper's stochastic masking) and the
    others are divided by 1 - dropout. The paper draws one mask a step; here every image has its own, so that it does
    not depend on the batch.
    """

    name = "remap_mlae"

    class Config(LayerDelta.Config):
        """Where a backbone reads a layer's weight instead of calling it (BEiT, EVA-02), no expert is masked."""

        rank: int = Field(default=8, ge=1, description="Number of experts, each of rank 1.")
        strength: float = Field(default=1.0, gt=0.0, description="Coefficient lambda of every expert at the start.")
        dropout: float = Field(default=0.5, ge=0.0, lt=1.0, description="Probability of masking an expert.")

    config: Config

    def delta(self, weight_oi: Tensor, site: int, called: bool) -> Delta:
        return Experts(weight_oi, self.config, SampleDropout(self.config.dropout if called else 0.0, site))


class Experts(Delta):
    """The experts of one layer; b is zero at first."""

    def __init__(self, weight_oi: Tensor, config: MLAE.Config, dropout: SampleDropout) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(config.rank, weight_oi.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight_oi.shape[0], config.rank))
        self.coefficients = nn.Parameter(torch.full((config.rank,), config.strength))
        self.dropout = dropout
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return (self.up * self.coefficients) @ self.down

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.down)
        keys_B = self.dropout.keys_B if self.dropout.training else None  # those of the last step stay there
        ones = self.coefficients.expand(1 if keys_B is None else len(keys_B), -1)
        strength_Br = self.dropout(ones).to(hidden.dtype)
        # Rows of an image stand together, those of its windows too.
        masked = hidden.reshape(len(strength_Br), -1, hidden.shape[-1]) * strength_Br[:, None]
        return F.linear(masked.view(hidden.shape), self.up)
