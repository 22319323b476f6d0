"""RepAdapter (Luo et al. 2023, arXiv 2302.08106): linear adapters that fold into the layers behind them.

Letters: D width, r bottleneck, g groups, o output features of the layers that read the norm; leading dimensions are
batch and tokens, (B, T) or (B, H, W).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, AttentionBlock, Projection, module_at
from remap.errors import BackboneError
from remap.tuning.adapter.bottleneck import insert_adapter
from remap.tuning.base import Attachment, Edits, Fold, Method, Options
from remap.tuning.dropout import SampleDropout
from remap.tuning.weights import own_bias, registered_at, weight_of


class RepAdapter(Method):
    """n + s * (B dropout(A n + a) + b) in place of every norm's output n: 2*L*(D*r + r + D*r/g + D) parameters.

    A is dense, B in g groups. Where neither the layers behind a norm nor the norm itself have biases, a and b could not
    be folded and are left out (D + r fewer).
    """

    class Config(Options):
        bottleneck: int = Field(default=8, ge=1, description="Width of the bottleneck.")
        groups: int = Field(default=2, ge=1, description="Groups of the up-projection.")
        scale: float = Field(default=1.0, gt=0.0, description="Factor on the output; 0.1 to 10 in the paper.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability in the bottleneck.")
        place: Literal["block", "attention"] = Field(
            default="block", description="Before attention and MLP, or attention only."
        )

        @model_validator(mode="after")
        def _whole_groups(self) -> Self:
            if self.bottleneck % self.groups:
                raise ValueError(f"bottleneck ({self.bottleneck}) must be a multiple of groups ({self.groups})")
            return self

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        for block in anatomy.blocks:
            if block.width % self.config.groups:
                raise BackboneError(
                    "repadapter's groups must divide the width of every block",
                    given=f"groups {self.config.groups}, width {block.width}",
                    do="choose another number of groups",
                )
        sites: list[Site] = []
        edits = Edits(model)
        for block in anatomy.attention_blocks:
            for word, norm, readers in _inputs(block)[: 2 if self.config.place == "block" else 1]:
                # Window transformers pad the norm's output with zeros, which a bias of the layers would reach as well.
                in_layers = "sequence" in anatomy.parts and all(own_bias(model, r) is not None for r in readers)
                has_bias = in_layers or module_at(model, norm)._parameters.get("bias") is not None
                adapter = LinearBottleneck(block.width, self.config, has_bias, site=len(sites))
                insert_adapter(edits, block, f"remap_repadapter_{word}", adapter)
                edits.after(norm, adapter.change_output)
                sites.append(Site(adapter, edits.added[-1], norm, readers, in_layers))
        fold = Fold(partial(_fold, model, sites), stage=3, check=partial(_require_exact_fold, sites))
        return Attachment(edits, fold=fold)


@dataclass(frozen=True)
class Site:
    """An adapter and its path, the norm it stands behind, and the projections that read it.

    ``in_layers``: all of these have a bias that can take the adapter's; else it goes into the norm's.
    """

    adapter: "LinearBottleneck"
    path: str
    norm: str
    readers: tuple[Projection, ...]
    in_layers: bool


class LinearBottleneck(nn.Module):
    """s * (B dropout(A x + a) + b), (..., D) to (..., D); 0 at the start, because B and b are."""

    def __init__(self, width: int, config: RepAdapter.Config, bias: bool, site: int) -> None:
        super().__init__()
        self.scale, self.groups = config.scale, config.groups
        self.down = nn.Linear(width, config.bottleneck, bias=bias)
        self.dropout = SampleDropout(config.dropout, site)
        self.up = nn.Linear(config.bottleneck // config.groups, width, bias=bias)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def dense_up(self) -> Tensor:
        """Return (D, r): group i of the outputs reads group i of the bottleneck."""
        return torch.block_diag(*self.up.weight.chunk(self.groups))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.dropout(self.down(x)), self.dense_up(), self.up.bias) * self.scale

    def change_output(self, norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the norm."""
        return output + self(output)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return U (D, r), A (r, D) and c (D,) in float64 with x + adapter(x) = x + U A x + c."""
        up_Dr, down_rD = self.scale * self.dense_up().double(), self.down.weight.double()
        if self.up.bias is None:
            return up_Dr, down_rD, None
        return up_Dr, down_rD, up_Dr @ self.down.bias.double() + self.scale * self.up.bias.double()


def _fold(model: nn.Module, sites: list[Site]) -> None:
    """Write W (x + U A x + c) + b as W' x + b': W' = W + W U A, b' = b + W c."""
    for site in sites:
        shift_D = _shift_of_norm(site)
        up_Dr, down_rD, constant_D = site.adapter.factors()
        for reader in site.readers:
            weight_oD = weight_of(model, reader)[reader.rows]
            if constant_D is not None and site.in_layers:
                bias = own_bias(model, reader)
                assert bias is not None
                bias_o = bias[reader.bias_start : reader.bias_start + reader.stop - reader.start]
                bias_o.copy_(bias_o.double() + weight_oD.double() @ constant_D)
            weight_oD.copy_(weight_oD.double() + weight_oD.double() @ up_Dr @ down_rD)
        if shift_D is not None:
            bias_D = registered_at(model, f"{site.norm}.bias")
            bias_D.copy_(bias_D.double() + shift_D)


def _require_exact_fold(sites: list[Site]) -> None:
    for site in sites:
        _shift_of_norm(site)


def _shift_of_norm(site: Site) -> Tensor | None:
    """Return (I + U A)^-1 c: what the norm's bias must grow by so that the folded layers see c without their own bias.

    Exact also where the keys have no bias and are rotated, so that a constant in them would matter. Raises a
    BackboneError where rounding would make it inexact.
    """
    up_Dr, down_rD, constant_D = site.adapter.factors()
    if site.in_layers or constant_D is None:
        return None
    # The inverse by Woodbury's identity, I - U (I + A U)^-1 A.
    system_rr = torch.eye(len(down_rD), dtype=torch.float64, device=up_Dr.device) + down_rD @ up_Dr
    solved_r, singular = torch.linalg.solve_ex(system_rr, down_rD @ constant_D)
    shift_D = constant_D - up_Dr @ solved_r
    # A bias far larger than what it stands for would lose it to rounding.
    if singular or not shift_D.norm() <= 100 * constant_D.norm():
        raise BackboneError(
            "the adapter's bias cannot be folded exactly: only the norm's bias could take it, and the adapter "
            "removes a direction of the norm's output",
            given=site.path,
            do="keep the task files: they reload the tuned model exactly",
        )
    return shift_D


def _inputs(block: AttentionBlock) -> list[tuple[str, str, tuple[Projection, ...]]]:
    """Return the two norms of a block, each with the projections that read it."""
    linears = block.projections
    hidden = tuple(linears[word] for word in ("fc1", "fc1_gate") if word in linears)
    return [("attn", block.norm1, (linears["q"], linears["k"], linears["v"])), ("mlp", block.norm2, hidden)]
