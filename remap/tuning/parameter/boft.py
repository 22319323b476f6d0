"""BOFT (Liu et al. 2023, arXiv 2311.06243): orthogonal fine-tuning with a butterfly of sparse rotations.

Letters: i input and o output features of a layer, m factors, n blocks, b block size; all factors together mix the
inputs within G groups of g = b * 2^(m-1).
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Method, Options
from remap.tuning.layers import LayerTargets, layers_of
from remap.tuning.parameter.peft_layer import SharedLinear, attach_changes, shared_linears
from remap.tuning.weights import full_precision


class BOFT(Method):
    """W' = diag(s) W (B_m ... B_1)^T: every factor rotates groups of ``block_size`` inputs (section 4).

    Factor k puts half a group next to the half that lies 2^(k-1) halves on, as in a Fourier transform, so that m
    factors mix 2^(m-1) groups; one factor is OFT with a scale. Rotations are (I - Q)(I + Q)^-1 with Q the
    skew-symmetric part of a trained block. L*(m*D*b + 3*D) parameters on fused q, k, v.

    peft's BOFT has more than one factor only with a CUDA extension that it compiles on the spot.
    """

    class Config(Options):
        block_size: int = Field(default=4, ge=2, description="Size of the rotated blocks of inputs.")
        factors: int = Field(default=2, ge=1, description="Butterfly factors; 1 is OFT with a scale.")
        targets: LayerTargets = None

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        layers = layers_of(anatomy, self.config.targets)
        changes = [
            Butterfly(linear, self.config.block_size, self.config.factors) for linear in shared_linears(model, layers)
        ]
        return attach_changes(model, "remap_boft", layers, changes)


class Butterfly(nn.Module):
    """The change of one layer."""

    def __init__(self, base_layer: SharedLinear, block_size: int, factors: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        size = base_layer.in_features
        if size % (block_size * 2 ** (factors - 1)) or (factors > 1 and block_size % 2):
            raise BackboneError(
                "the butterfly does not fit a layer",
                given=f"block_size {block_size}, factors {factors}, {size} inputs",
                do="block_size * 2^(factors - 1) must divide the inputs, and block_size be even with several factors",
            )
        self.block_size, self.factors = block_size, factors
        self.blocks = nn.Parameter(torch.zeros(factors, size // block_size, block_size, block_size))
        self.scale = nn.Parameter(torch.ones(base_layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., i) to (..., o); rotates and scales x and the output, or the weight where that is smaller."""
        weight_oi, bias = self.base_layer.weight, self.base_layer.bias
        # An exported program takes inputs of any size, so it has one way for all. Images keep their order of memory.
        one_way = torch.compiler.is_exporting() or self.base_layer.channels_first
        by_weight = one_way or x.numel() >= weight_oi.numel()
        with full_precision(x):
            rotation_Ggg = self._rotation()
            if by_weight:
                turned_oi = _in_groups(weight_oi, rotation_Ggg.mT.to(weight_oi.dtype))
                weight_oi = turned_oi * self.scale[:, None]
        if by_weight:
            return self.base_layer(x, weight=weight_oi)
        out = self.base_layer(_in_groups(x, rotation_Ggg.to(x.dtype)))
        if bias is None:
            return (out * self.scale).to(out.dtype)
        # As (out - bias) * scale + bias, and exactly out at scale 1.
        return torch.addcmul(bias * (1 - self.scale), out, self.scale).to(out.dtype)

    def _rotation(self) -> Tensor:
        """Return (G, g, g): the product of the factors, in float32 at least, as 16 bits have no solver."""
        blocks_mnbb = self.blocks.to(torch.promote_types(self.blocks.dtype, torch.float32))
        skew_mnbb = (blocks_mnbb - blocks_mnbb.mT) / 2
        unit_bb = torch.eye(self.block_size, device=skew_mnbb.device, dtype=skew_mnbb.dtype)
        rotations_mnbb = torch.linalg.solve(unit_bb + skew_mnbb, unit_bb - skew_mnbb, left=False)
        group = self.block_size * 2 ** (self.factors - 1)
        # Row k is the k-th input of every group.
        rows_gi = torch.eye(group, device=skew_mnbb.device, dtype=skew_mnbb.dtype)
        rows_gi = rows_gi.repeat(1, self.base_layer.in_features // group)
        for factor in reversed(range(self.factors)):
            apart, half = 2**factor, self.block_size // 2
            if factor:  # half a block next to the half that lies ``apart`` halves on
                rows_gi = rows_gi.unflatten(-1, (-1, 2, apart, half)).transpose(-3, -2).flatten(-4)
            rows_gi = _in_groups(rows_gi, rotations_mnbb[factor])
            if factor:
                rows_gi = rows_gi.unflatten(-1, (-1, apart, 2, half)).transpose(-3, -2).flatten(-4)
        return rows_gi.unflatten(-1, (-1, group)).transpose(0, 1)


def _in_groups(x: Tensor, matrices_Ggg: Tensor) -> Tensor:
    """Multiply (..., i) by one matrix for each group of neighbouring inputs."""
    x_Gg = x.unflatten(-1, (-1, matrices_Ggg.shape[-1]))
    return torch.einsum("...Gg,Ggh->...Gh", x_Gg, matrices_Ggg).flatten(-2)
