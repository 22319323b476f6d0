"""Ladder side-tuning (Sung et al. 2022, arXiv 2206.06522): a narrow transformer beside the frozen one.

Letters: B batch, T tokens, P prefix tokens, D width, d side width, L depth.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.seam import FeatureSeam

TEMPERATURE = 0.1


class LadderSideTuning(Method):
    """s_0 = down_0(h_0), s_i = block_i(g_i * down_i(h_i) + (1 - g_i) * s_{i-1}) for i = 1 ... L.

    h_0 is the input of the backbone's first block, h_i the output of its i-th; no gradient enters the backbone. A
    side block is a pre-norm transformer block of width d = D // ``reduction``, with an MLP of 4*d and without
    position bias (the tokens carry their positions). The classifier reads the side network alone:
    y = up(norm(pool(s_L))), where the pool is the class token where the backbone's own classifier reads that (of
    distilled models each classifier reads its token), else the mean of the patches, and the norm has no weights
    (those of the paper's would be absorbed by ``up``).

    Parameters: L*(12*d*d + 13*d) + (L + 1)*(D*d + d) + d*D + D. Gates are not among them: by default g_i = 1/2, what
    the paper's learned gates g_i = sigmoid(alpha_i / 0.1) start from. ``gates="learned"`` trains the alpha_i, L
    parameters more. Both are the same class of functions, because the ratio of the two summands can also be learned
    by ``down_i`` and the scale of the sum does not pass a block's norms.

    Side weights start as timm's of a transformer do (trunc_normal 0.02); the paper's pruned copies of the backbone's
    weights, which depend on the family, are left out.
    """

    class Config(Options):
        reduction: int = Field(default=8, ge=1, description="Backbone width / side network width.")
        gates: Literal["fixed", "learned"] = Field(default="fixed", description="Mix of the two: one half, or learned.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        if self.config.reduction > anatomy.width:
            raise BackboneError(
                "the side network would have no width",
                given=f"reduction {self.config.reduction}",
                allowed=f"1 to {anatomy.width}, the backbone's width",
            )
        like = next(model.parameters())
        edits = Edits(model)
        ladder = edits.insert("remap_lst", Ladder(anatomy, self.config), like)
        edits.before(anatomy.blocks[0].block, ladder.start)
        for index, block in enumerate(anatomy.blocks, start=1):
            edits.after(block.block, partial(ladder.step, index))
        for number, path in enumerate(anatomy.classifier_heads):
            last = path == anatomy.classifier_heads[-1]
            edits.before(path, partial(ladder.replace, number, last))
        return Attachment(edits, identity_at_init=False, seam=LadderSeam(model, anatomy, ladder))


class Ladder(nn.Module):
    """The side network and its hooks.

    The hooks on blocks only project down what they see, which is all that gradient checkpointing may run again in
    another order; the side network itself runs where the classifier begins.
    """

    def __init__(self, anatomy: Anatomy, config: LadderSideTuning.Config) -> None:
        super().__init__()
        width, side = anatomy.width, anatomy.width // config.reduction
        heads = num_heads(side, anatomy.head_dim)
        self.prefix, self.class_token = anatomy.num_prefix_tokens, anatomy.class_token_pooled
        self.by_token = len(anatomy.classifier_heads) > 1
        self.downs = nn.ModuleList(nn.Linear(width, side) for _ in range(anatomy.depth + 1))
        self.blocks = nn.ModuleList(SideBlock(side, heads) for _ in range(anatomy.depth))
        self.up = nn.Linear(side, anatomy.feature_width)
        self.gates = nn.Parameter(torch.zeros(anatomy.depth)) if config.gates == "learned" else None
        for linear in (*self.downs, self.up):  # keeps the variance of its input
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        self.rungs: dict[int, Tensor] = {}
        self.kept: dict[str, Tensor] | None = None
        self._side_BTd: Tensor | None = None

    def forward(self, rungs: Mapping[int, Tensor]) -> Tensor:
        """Return the side tokens (B, T, d) from all L + 1 rungs of that shape."""
        side_BTd = rungs[0]
        for index, block in enumerate(self.blocks):
            gate = 0.5 if self.gates is None else (self.gates[index] / TEMPERATURE).sigmoid()
            side_BTd = block(gate * rungs[index + 1] + (1 - gate) * side_BTd)
        return side_BTd

    def start(self, block: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the backbone's first block."""
        self._see(0, args[0])

    def step(self, index: int, block: nn.Module, args: tuple, output_BTD: Tensor) -> None:
        """Forward hook of the backbone's ``index``-th block, counted from 1."""
        self._see(index, output_BTD)

    def _see(self, index: int, tokens_BTD: Tensor) -> None:
        if self.kept is not None:
            self.kept[f"tokens.{index}"] = tokens_BTD
        else:
            self.rungs[index] = self.downs[index](tokens_BTD)

    def replace(self, number: int, last: bool, head: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the classifier's linear layer ``number``; ``last`` says that no other one follows."""
        if self._side_BTd is None:
            if len(self.rungs) <= len(self.blocks):
                raise BackboneError("the side network has not seen these features", do="call forward_features first")
            self._side_BTd, self.rungs = self(self.rungs), {}
        side_BTd = self._side_BTd
        if last:
            self._side_BTd = None
        if self.class_token or self.by_token:
            pooled_Bd = side_BTd[:, number]
        else:
            pooled_Bd = side_BTd[:, self.prefix :].mean(1)
        return (self.up(F.layer_norm(pooled_Bd, pooled_Bd.shape[-1:], eps=1e-6)), *args[1:])

    def __getstate__(self) -> dict[str, Any]:
        # A block that gradient checkpointing ran again leaves a rung behind, which can be neither copied nor saved.
        return {**self.__dict__, "rungs": {}, "kept": None, "_side_BTd": None}


class SideBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): 12*d*d + 13*d parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTd: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BTd)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_BTd = x_BTd + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x_BTd + self.fc2(F.gelu(self.fc1(self.norm2(x_BTd))))


def num_heads(width: int, head_dim: int) -> int:
    """Return the divisor of ``width`` that brings the heads' width closest to ``head_dim``, the larger one of two."""
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: (abs(width // heads - head_dim), -heads))


class LadderSeam(FeatureSeam):
    """Kept are the tokens at all L + 1 rungs; the rest is the side network."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, ladder: Ladder) -> None:
        super().__init__(model, anatomy)
        self.ladder = ladder

    @torch.no_grad()
    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        self.ladder.kept = kept
        try:
            super().stem(images_BCHW)
        finally:
            self.ladder.kept = None
        return kept

    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        downs = self.ladder.downs
        self.ladder.rungs = {index: down(kept[f"tokens.{index}"]) for index, down in enumerate(downs)}
        # The ladder replaces what the classifier is given.
        ignored = kept["tokens.0"][:, 0]
        return super().rest(dict.fromkeys(self.anatomy.classifier_heads, ignored), images_BCHW, whole_blocks=False)
