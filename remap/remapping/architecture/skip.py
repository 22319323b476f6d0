"""Learn which frozen blocks to skip, after NetTailor (Morgado and Vasconcelos 2019, arXiv 1907.00274).

Letters: L gated units (blocks or branches), g gate, c relative cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionBlock, Block, ConvBlock, module_at
from remap.backbones.model_folder import require_free, save_model_folder
from remap.errors import BackboneError
from remap.remapping.architecture.remove_blocks import take_out
from remap.remapping.architecture.shrink import Shape
from remap.tuning.attached import Attached
from remap.tuning.base import Attachment, Edits, Fold, Method, Options, TrainingHooks, is_inserted
from remap.tuning.weights import registered


class Skip(Method):
    """x + g * branch(x) with one gate g >= 0 a block: L parameters. The loss gets ``cost`` * (sum c g)^2 / sum c g^2.

    c_l is the block's share of the multiply-adds of all gated layers. The fraction is the share of the network that is
    effectively open: 1 for equal gates, c_l where block l alone is open (the Hoyer-square measure of Yang et al. 2020,
    arXiv 1908.09979, with these weights). A common factor of all gates does not change it. A plain sum would fall by
    making all of them small together, which the norms behind the blocks nearly undo. The gate is the parameter itself,
    1 at the start (the pretrained network); one that falls below 0 is set to 0 after the step. By this projection it
    reaches 0 exactly, where the block has no effect, and can grow again, while a sigmoid would neither begin at 1 nor
    end at 0. It has no upper bound.
    NetTailor's gates are a softmax over a block and small layers next to it, trained for the task. Here such a layer is
    another method of a combination: ``skip+adaptformer`` keeps an adapter where a block closes, ``skip+lora`` tunes
    what stays.
    """

    class Config(Options):
        cost: float = Field(default=1.0, ge=0.0, description="Cost of the fully open network, in units of the loss.")
        gates: Literal["block", "branch"] = Field(
            default="block", description="One gate per block, or per branch (attention, MLP)."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        gates: list[_Gated] = []
        edits = Edits(model)
        for block in anatomy.blocks:
            branches = _branches(model, block)
            parts = [branches] if self.config.gates == "block" else [[branch] for branch in branches]
            for number, part in enumerate(parts):
                like = registered(module_at(model, branches[0].layers[0]), "weight")
                gate = edits.insert(f"{block.block}.remap_skip{number or ''}", Gate(), like)
                for branch in part:
                    edits.after(branch.end, partial(_scale, gate))
                work = sum(_multiply_adds(model, block, branch) for branch in part)
                gates.append(_Gated(gate, block, tuple(part), work))
        # The gate is behind all that other methods do with the last layer of a branch.
        folds = all(branch.fold for gated in gates for branch in gated.branches)
        fold = Fold(partial(_fold, model, gates), stage=4) if folds else None
        return Attachment(edits, fold=fold, hooks=Gates(gates, anatomy, self.config.cost))


class Gate(nn.Module):
    """g, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))


@dataclass(frozen=True)
class _Branch:
    """A residual branch: its last module and the layers inside.

    ``fold`` is the module whose weight and bias can take the gate, None where there is none.
    """

    end: str
    layers: tuple[str, ...]
    fold: str | None


@dataclass(frozen=True)
class _Gated:
    """What one gate is for."""

    gate: Gate
    block: Block
    branches: tuple[_Branch, ...]
    multiply_adds: int


class Gates(TrainingHooks):
    """All gates of a network: their price, and that none falls below 0."""

    def __init__(self, gates: Sequence[_Gated], anatomy: Anatomy, cost: float) -> None:
        self.gates, self.anatomy, self.cost = gates, anatomy, cost
        total = sum(gated.multiply_adds for gated in gates)
        self.shares = [gated.multiply_adds / total for gated in gates]

    def penalty(self) -> Tensor:
        gates = [gated.gate.gate.float() for gated in self.gates]
        open_share = reduce(torch.add, (share * gate for share, gate in zip(self.shares, gates, strict=True)))
        squares = reduce(torch.add, (share * gate.square() for share, gate in zip(self.shares, gates, strict=True)))
        # All closed, nothing is open: 0 / tiny stays 0.
        return self.cost * open_share.square() / squares.clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        for gated in self.gates:
            gated.gate.gate.clamp_(min=0.0)

    def openness(self) -> list[float]:
        """Return the largest of its gates for every block of the network."""
        largest = dict.fromkeys((block.block for block in self.anatomy.blocks), 0.0)
        for gated in self.gates:
            largest[gated.block.block] = max(largest[gated.block.block], gated.gate.gate.item())
        return list(largest.values())


def _fold(model: nn.Module, gates: Sequence[_Gated]) -> None:
    for gated in gates:
        for branch in gated.branches:
            assert branch.fold is not None
            for tensor in module_at(model, branch.fold).parameters(recurse=False):
                tensor.mul_(gated.gate.gate)


def gates_of(attached: Attached) -> Gates:
    """Return the gates of ``skip`` or of a combination with it; without any, raise a BackboneError."""
    for member in attached.methods.values():
        if isinstance(member.hooks, Gates):
            return member.hooks
    raise BackboneError("this network has no gates", do="tune it with --method skip, alone or combined")


def save_remaining(attached: Attached, folder: Path, threshold: float = 0.05, classes: Sequence[str] = ()) -> list[int]:
    """Fold the method into the weights, remove closed blocks, and write the rest as a model folder of timm.

    Closed are blocks whose gates are all at or below ``threshold``. The classifier is written too. The model is
    changed. Where every block that goes has a gate of 0, the function stays what it was.

    Args:
        classes: Names for the classifier's outputs, for timm's configuration.

    Returns:
        The blocks that stayed.

    Raises:
        BackboneError: There are no gates, a part of a combination cannot be folded, no block would be left, or timm
            cannot build the rest.
        RunError: The folder cannot be written.
    """
    require_free(folder)
    model, openness = attached.model, gates_of(attached).openness()
    closed = [index for index, gate in enumerate(openness) if gate <= threshold]
    if len(closed) == len(openness):
        raise BackboneError(
            "every block would be taken out",
            given=f"threshold {threshold:g}, gates {', '.join(f'{gate:.2f}' for gate in openness)}",
            do="lower the threshold, or tune again with a lower --set method.cost",
        )
    if closed:
        take_out(model, [])  # refuses before anything is changed
    attached.merge()
    if closed:
        take_out(model, closed)
    shape: dict[str, object] = {}
    if "sequence" in attached.anatomy.parts:
        left = replace(Shape.of(attached.anatomy), depth=len(openness) - len(closed))
        shape = left.arguments(attached.anatomy)
    save_model_folder(model.eval(), folder, shape, classes)
    return [index for index in range(len(openness)) if index not in closed]


def _branches(model: nn.Module, block: Block) -> list[_Branch]:
    if isinstance(block, AttentionBlock):
        words = (("q", "k", "v", "o"), ("fc1", "fc1_gate", "fc2"))
        ends = (block.attn_branch_end, block.mlp_branch_end)
        scaled = (block.norm1, block.norm2) if block.norms_behind else (block.proj, block.fc2)
        paths = ([block.projections[word].path for word in names if word in block.projections] for names in words)
        return [
            _Branch(end, tuple(dict.fromkeys(layers)), layer)
            for end, layers, layer in zip(ends, paths, scaled, strict=True)
        ]
    assert isinstance(block, ConvBlock)
    inside = module_at(model, block.block).named_modules()
    layers = tuple(
        f"{block.block}.{name}"
        for name, module in inside
        if isinstance(module, nn.Linear | nn.Conv2d) and not is_inserted(name)
    )
    return [_Branch(block.branch_end, layers, _end_of(model, block))]


def _end_of(model: nn.Module, block: ConvBlock) -> str | None:
    """Return the layer or norm whose weight and bias scale what the block adds, if one does."""
    if "fc2" in block.projections:
        return block.projections["fc2"].path
    # A module without parameters behind the norm (drop-path) lets a scale through; squeeze-and-excitation does not.
    last = module_at(model, block.branch_end)
    norms = [path for path in block.norms if path.rpartition(".")[0] == block.block]
    end = block.branch_end if block.branch_end in norms else None if list(last.parameters()) else norms[-1]
    return end if end is not None and module_at(model, end)._parameters.get("weight") is not None else None


def _multiply_adds(model: nn.Module, block: Block, branch: _Branch) -> int:
    """Return the multiply-adds of a branch for one image, as if all its layers worked on the block's grid."""
    return prod(block.grid) * sum(registered(module_at(model, path), "weight").numel() for path in branch.layers)


def _scale(gate: Gate, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
    return output * gate.gate.to(output.dtype)
