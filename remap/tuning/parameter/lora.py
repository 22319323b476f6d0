"""LoRA (Hu et al. 2021, arXiv 2106.09685): a low-rank change of linear layers.

Letters: B leading dimension, N tokens, T rows (all leading dimensions), i input and o output features, r rank,
n changed projections of one layer.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, Block, Projection, module_at
from remap.errors import BackboneError
from remap.tuning.base import Attached, Method, Options, insert_module, inserted_parameters, vectors
from remap.tuning.dropout import SampleDropout
from remap.tuning.weights import channels_first, drop, recompute, registered, require_rank

_NAME = "remap_lora"

Target = Literal["q", "k", "v", "o", "fc1", "fc2"]


class LoRA(Method):
    """W x + b + alpha / rank * B A x, section 4.1: rank * (i + o) parameters a projection.

    Every projection has an A and a B of its own, also where one layer makes queries, keys and values.
    """

    class Config(Options):
        """The paper adapts queries and values.

        fc1 takes the gate of a gated MLP along. Where a backbone reads a layer's weight instead of calling the layer
        (BEiT, EVA-02), there is no input of A and no dropout.
        """

        rank: int = Field(default=8, ge=1, description="Rank of the update.")
        alpha: float | None = Field(default=None, gt=0.0, description="Scale is alpha / rank; null is alpha = rank.")
        targets: tuple[Target, ...] | None = Field(
            default=None, min_length=1, description="Layers to change; null is [q, v], or [fc1, fc2] without attention."
        )
        dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout probability on the input of A.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        words = with_gates(self.config.targets or default_targets(anatomy))
        layers: dict[str, tuple[Projection, ...]] = {}
        for block in anatomy.blocks:
            layers |= _by_layer(block, words)
        handles: list[RemovableHandle] = []
        undo = []
        for site, (path, projections) in enumerate(layers.items()):
            layer = module_at(model, path)
            like = registered(layer, "weight")
            for projection in projections:
                shape = (projection.stop - projection.start, like.shape[1])
                require_rank(self.config.rank, min(shape), path, shape)
            lora = LowRank(tuple(like.shape[:2]), projections, self.config, site).to(
                device=like.device, dtype=like.dtype
            )
            insert_module(model, f"{path}.{_NAME}", lora)
            if all(projection.called for projection in projections):
                hook = _add_to_convolution if channels_first(layer) else _add_to_output
                # In front of what others do with the output: the scale of a branch acts on the sum.
                handles.append(layer.register_forward_hook(partial(hook, lora), prepend=True))
            else:
                undo.append(recompute(layer, "weight", partial(_add_to_weight, lora), first=True))
        added = [f"{path}.{_NAME}" for path in layers]
        names = inserted_parameters(model, added)
        return _Attached(
            model, anatomy, trainable=names, no_decay=vectors(names), added=added, handles=handles, undo=undo
        )


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

    def up_rows(self) -> Tensor:
        """(n*r, rows of the layer): transposed and scaled B's, each at its rows and zero elsewhere."""
        _, width, rank = self.up.shape
        scaled = self.up.mT * self.scale
        columns = [
            nn.functional.pad(scaled[index], (start, self.rows - start - width))
            for index, start in enumerate(self.starts)
        ]
        return torch.cat(columns) if len(columns) > 1 else columns[0]

    def delta(self) -> Tensor:
        """(rows of the layer, i), what is added to the weight."""
        return self.up_rows().T @ self.down


class _Attached(Attached):
    def __init__(self, model: nn.Module, anatomy: Anatomy, **facts: object) -> None:
        super().__init__(model, anatomy, mergeable=True, **facts)

    def _fold(self) -> None:
        for path in self.added:
            weight = registered(module_at(self.model, path.rpartition(".")[0]), "weight")
            weight += module_at(self.model, path).delta().view_as(weight)


def default_targets(anatomy: Anatomy) -> tuple[str, ...]:
    """Queries and values where there are any, else the MLP."""
    return ("q", "v") if "attention" in anatomy.parts else ("fc1", "fc2")


def with_gates(words: Iterable[str]) -> list[str]:
    """Words of projections, each once; fc1 brings fc1_gate."""
    return list(dict.fromkeys(part for word in words for part in ((word, "fc1_gate") if word == "fc1" else (word,))))


def chosen(block: Block, words: Iterable[str]) -> dict[str, Projection]:
    """The projections of a block among ``words``; the gate only where there is one.

    Raises:
        BackboneError: The block lacks one of the others.
    """
    wanted = [word for word in words if word != "fc1_gate" or word in block.projections]
    missing = [word for word in wanted if word not in block.projections]
    if missing:
        raise BackboneError(
            f"{block.block} of this backbone has no {', '.join(missing)}",
            given=f"targets {', '.join(wanted)}",
            allowed=", ".join(block.projections),
        )
    return {word: block.projections[word] for word in wanted}


def _by_layer(block: Block, words: Iterable[str]) -> dict[str, tuple[Projection, ...]]:
    """The chosen projections by the layer that makes them, in the order of its rows."""
    layers: dict[str, list[Projection]] = {}
    for projection in sorted(chosen(block, words).values(), key=lambda projection: projection.start):
        layers.setdefault(projection.path, []).append(projection)
    return {path: tuple(projections) for path, projections in layers.items()}


def _add_to_output(lora: LowRank, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a linear layer: one product for all A's, one for all B's that adds to the output."""
    hidden = drop(lora.dropout, args[0]) @ lora.down.to(args[0].dtype).T
    up = lora.up_rows().to(output.dtype)
    if output.ndim == 3:
        # The output is fresh and nobody's: adding in place saves a pass over a tensor three times as wide as x.
        return output.baddbmm_(hidden.to(output.dtype), up.expand(len(output), -1, -1))
    sum_To = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2).to(output.dtype), up)
    return sum_To.view(output.shape)


def _add_to_convolution(lora: LowRank, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a 1x1 convolution: (B, i, H, W) to (B, o, H, W)."""
    hidden = nn.functional.conv2d(drop(lora.dropout, args[0]), lora.down[:, :, None, None])
    return output + nn.functional.conv2d(hidden, lora.up_rows().T[:, :, None, None])


def _add_to_weight(lora: LowRank, weight: Tensor) -> Tensor:
    return weight + lora.delta().view_as(weight)
