"""DiffFit (Xie et al. 2023, arXiv 2304.06648): biases, norms, and a scale of every branch."""

from functools import partial

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, Projection
from remap.tuning.base import Attachment, Edits, Fold, Method
from remap.tuning.parameter.bitfit import bias_parameters
from remap.tuning.parameter.norm import norm_parameters
from remap.tuning.weights import registered_at, weight_of


class DiffFit(Method):
    """x + gamma1 * attn(norm1(x)), then x + gamma2 * mlp(norm2(x)), and all biases and norm weights train.

    The scales start at 1. They act on the outputs of the branches' last linear layers; LayerScale and drop-path, which
    come behind, commute with them. 140,544 parameters on ViT-B/16.
    """

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        scales: list[tuple[Projection, BranchScale]] = []
        edits = Edits(model)
        for block in anatomy.attention_blocks:
            for word in ("o", "fc2"):
                end = block.projections[word]
                scale = edits.insert(f"{end.path}.remap_diffit", BranchScale(block.width), weight_of(model, end))
                edits.after(end.path, scale.scale_output)
                scales.append((end, scale))
        tuned = dict.fromkeys([*bias_parameters(model, anatomy), *norm_parameters(model, anatomy)])
        names = [*tuned, *edits.parameters()]
        fold = Fold(partial(_fold, model, scales), stage=2)
        return Attachment(edits, trainable=names, no_decay=names, fold=fold)


class BranchScale(nn.Module):
    """gamma (D,) of one branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def scale_output(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the branch's last linear layer."""
        return (output * self.gamma).to(output.dtype)


def _fold(model: nn.Module, scales: list[tuple[Projection, BranchScale]]) -> None:
    for end, scale in scales:
        weight = weight_of(model, end)
        weight.mul_(scale.gamma.view(-1, *[1] * (weight.ndim - 1)))
        if end.bias is not None:
            registered_at(model, end.bias).mul_(scale.gamma)
