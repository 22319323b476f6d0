"""LoRA (Hu et al. 2021, arXiv 2106.09685): a low-rank change of linear layers.

Letters: B leading dimension, N tokens, T rows (all leading dimensions), i input and o output features, r rank,
n changed projections of one layer.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, Projection, module_at
from remap.tuning.base import Attachment, Edits, Fold, Method, Options
from remap.tuning.dropout import SampleDropout
from remap.tuning.layers import ProjectionTargets, by_layer, chosen, target_words
from remap.tuning.weights import channels_first, drop, recompute_at, registered, require_rank


class LoRA(Method):
    """W x + b + alpha / rank * B A x, section 4.1: rank * (i + o) parameters a projection.

    Every projection has an A and a B of its own, also where one layer makes queries, keys and values.

    Attributes:
        name: Last component of the inserted modules' names.
    """

    name: ClassVar[str] = "remap_lora"

    class Config(Options):
        """The paper adapts queries and values.

        fc1 takes the gate of a gated MLP along. Where a backbone reads a layer's weight instead of calling the layer
        (BEiT, EVA-02), there is no input of A and no dropout.
        """

        rank: int = Field(default=8, ge=1, description="Rank of the update.")
        alpha: float | None = Field(default=None, gt=0.0, description="Scale is alpha / rank; null is alpha = rank.")
        targets: ProjectionTargets = None
        dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout probability on the input of A.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        words = target_words(anatomy, self.config.targets)
        changes: dict[str, LowRank] = {}
        edits = Edits(model)
        for block in anatomy.blocks:
            # By rows, not by block: this order decides which random numbers a layer draws.
            projections_of = by_layer(sorted(chosen(block, words).values(), key=lambda p: p.start))
            for path, projections in projections_of.items():
                layer = module_at(model, path)
                weight = registered(layer, "weight")
                like = weight.flatten(1)
                for projection in projections:
                    shape = (projection.stop - projection.start, like.shape[1])
                    require_rank(self.config.rank, min(shape), path, shape)
                lora = self.change((like.shape[0], like.shape[1]), projections, site=len(changes))
                changes[path] = edits.insert(f"{path}.{self.name}", lora, like)
                if all(projection.called for projection in projections):
                    hook = _add_to_convolution if channels_first(layer) else _add_to_output
                    # In front of what others do with the output: the scale of a branch acts on the sum.
                    edits.after(path, partial(hook, lora), first=True)
                else:
                    recompute_at(edits, f"{path}.weight", partial(_add_to_weight, lora), first=True)
        return Attachment(edits, fold=Fold(partial(_fold, model, changes)))

    def change(self, shape: tuple[int, int], projections: tuple[Projection, ...], site: int) -> "LowRank":
        """Return the change of a layer of ``shape`` (rows, input features)."""
        return LowRank(shape, projections, self.config, site)


class SLAD(LoRA):
    """W x + b + alpha / rank * B M A x: LoRA with a core M of rank x rank, the part that a teacher's adapters share.

    M is the identity at first, so that alone this starts as LoRA does. With ``teacher.joint`` the same M stands
    in the teacher (``remap.pipeline.shared_cores``). The paper's abstract does not say what of the
    adapters is shared: the core is ours.
    """

    name = "remap_slad"

    def change(self, shape: tuple[int, int], projections: tuple[Projection, ...], site: int) -> "LowRank":
        return WithCore(shape, projections, self.config, site)


class LowRank(nn.Module):
    """A and B of the projections that one layer makes; A's stand on top of one another, so that they are one product.

    Attributes:
        down: (n*r, i), every A.
        up: (n, o, r), every B, zero at first.
    """

    def __init__(
        self, shape: tuple[int, int], projections: tuple[Projection, ...], config: LoRA.Config, site: int
    ) -> None:
        super().__init__()
        self.rows = shape[0]
        self.starts = tuple(projection.start for projection in projections)
        width = projections[0].stop - projections[0].start
        assert all(projection.stop - projection.start == width for projection in projections)
        self.scale = (config.alpha or config.rank) / config.rank
        self.dropout = SampleDropout(config.dropout, site)
        self.down = nn.Parameter(torch.empty(len(projections) * config.rank, shape[1]))
        self.up = nn.Parameter(torch.zeros(len(projections), width, config.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def factor(self) -> Tensor:
        """Return (n, o, r), what stands in front of every A."""
        return self.up

    def up_rows(self) -> Tensor:
        """Return (n*r, rows of the layer): transposed and scaled B's, each at its rows and zero elsewhere."""
        width = self.up.shape[1]
        scaled = self.factor().mT * self.scale
        columns = [
            nn.functional.pad(scaled[index], (start, self.rows - start - width))
            for index, start in enumerate(self.starts)
        ]
        return torch.cat(columns) if len(columns) > 1 else columns[0]

    def delta(self) -> Tensor:
        """Return (rows of the layer, i), what is added to the weight."""
        return self.up_rows().T @ self.down


class WithCore(LowRank):
    """The change of one layer of SLAD.

    Attributes:
        core: (n, r, r), the identity at first.
    """

    def __init__(
        self, shape: tuple[int, int], projections: tuple[Projection, ...], config: LoRA.Config, site: int
    ) -> None:
        super().__init__(shape, projections, config, site)
        self.core = nn.Parameter(torch.eye(config.rank).repeat(len(projections), 1, 1))

    def factor(self) -> Tensor:
        return self.up @ self.core


def _fold(model: nn.Module, changes: Mapping[str, LowRank]) -> None:
    for path, lora in changes.items():
        weight = registered(module_at(model, path), "weight")
        weight += lora.delta().view_as(weight)


def _add_to_output(lora: LowRank, _layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a linear layer: one product for all A's, one for all B's that adds to the output."""
    hidden = drop(lora.dropout, args[0]) @ lora.down.to(args[0].dtype).T
    up = lora.up_rows().to(output.dtype)
    if output.ndim == 3:
        # No other module holds the output: adding in place saves a pass over a tensor three times as wide as x.
        return output.baddbmm_(hidden.to(output.dtype), up.expand(output.shape[0], -1, -1))
    sum_To = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2).to(output.dtype), up)
    return sum_To.view(output.shape)


def _add_to_convolution(lora: LowRank, _layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a 1x1 convolution: (B, i, H, W) to (B, o, H, W)."""
    hidden = nn.functional.conv2d(drop(lora.dropout, args[0]), lora.down[:, :, None, None])
    return output + nn.functional.conv2d(hidden, lora.up_rows().T[:, :, None, None])


def _add_to_weight(lora: LowRank, weight: Tensor) -> Tensor:
    return weight + lora.delta().view_as(weight)
