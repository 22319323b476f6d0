"""Methods of peft that multiply: rotations and reflections of inputs, rotations and scales of outputs."""

from typing import Literal

from peft import HRAConfig, IA3Config, OFTConfig, RoadConfig
from peft.tuners.hra.layer import HRALayer
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.tuning.layers import Target
from remap.tuning.parameter.peft_bridge.base import ADAPTER, PeftMethod, PeftOptions, Targets, Words
from remap.tuning.parameter.peft_layer import base_of


def _oft_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """Add a dimension to images: peft takes four dimensions for an image whose channels come first."""
    return change(x[None], **bias)[0] if x.ndim == 4 else change(x, **bias)


class OFT(PeftMethod):
    """W' = W R^T, R block-diagonal and orthogonal: (I - Q)(I + Q)^-1 with Q skew-symmetric (Cayley).

    Rotations act on the input. Where ``block_size`` does not divide a layer's input features, the divisor closest to
    it is taken.
    """

    name = "remap_oft"
    peft = PeftOptions(OFTConfig, {"oft_block_size": "block_size"}, {"r": 0, "use_cayley_neumann": False})
    run = staticmethod(_oft_run)

    class Config(Targets):
        """Options."""

        block_size: int = Field(default=32, ge=2, description="Size of the rotated blocks of inputs.")


class IA3(PeftMethod):
    """Learned vectors scale the outputs of layers, and the input of fc2 (equation 1 and section 3.3).

    The paper scales keys, values and the hidden units of the MLP; a fused layer gets its queries scaled as well.
    """

    name = "remap_ia3"
    default_targets = ("q", "k", "v", "fc2")
    moves_bias = True
    exempt = ("ia3_l",)

    class Config(Targets):
        """Options."""

        targets: tuple[Target, ...] | None = Field(
            default=None,
            min_length=1,
            description="Layers to scale; null is [q, k, v, fc2], or those of them that there are, or [linear].",
        )

    def peft_config(self, names: dict[str, Words]) -> IA3Config:
        inputs = [name for name, words in names.items() if "fc2" in words]
        return IA3Config(target_modules=list(names), feedforward_modules=inputs)


def _hra_run(change: nn.Module, x: Tensor) -> Tensor:
    """Compute what peft's forward does, which reads ``weight.data``: no exported program can hold that."""
    assert isinstance(change, HRALayer)
    rotation_ii, base = change.get_delta_weight(ADAPTER), base_of(change)
    bias = None if base.bias is None else base.bias.to(rotation_ii.dtype)
    return F.linear(x.to(rotation_ii.dtype), base.weight.to(rotation_ii.dtype) @ rotation_ii, bias).to(x.dtype)


class HRA(PeftMethod):
    """W' = W H_1 ... H_r with Householder reflections H_k = I - 2 u_k u_k^T / ||u_k||^2 (equation 5).

    Vectors start in equal pairs, which cancel up to rounding, hence the even rank.
    """

    name = "remap_hra"
    peft = PeftOptions(HRAConfig, {"r": "rank"})
    run = staticmethod(_hra_run)
    rank_within = "inputs"
    exact_start = False

    class Config(Targets):
        """Options."""

        rank: int = Field(
            default=8, ge=2, multiple_of=2, description="Number of reflections, which start in equal pairs."
        )


class RoAd(PeftMethod):
    """Pairs of outputs are rotated by a learned angle and scaled, the bias with them."""

    name = "remap_road"
    moves_bias = True

    class Config(Targets):
        """Options."""

        per_pair: Literal[1, 2, 4] = Field(
            default=1,
            description="Angles and scales: 1 per pair, 2 for each output, or 4 for each element of the 2x2 matrix.",
        )

    config: Config

    def peft_config(self, names: dict[str, Words]) -> RoadConfig:
        # Neighbours form pairs, as in the paper; larger groups only serve peft's batched inference.
        return RoadConfig(variant=f"road_{self.config.per_pair}", group_size=2, target_modules=list(names))
