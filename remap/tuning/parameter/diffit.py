"""DiffFit (Xie et al. 2023, arXiv 2304.06648): biases, norms, and a scale of every branch."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock, Projection, module_at
from remap.tuning.base import Attached, Method, insert_module, inserted_parameters
from remap.tuning.parameter.bitfit import bias_parameters
from remap.tuning.parameter.norm import norm_parameters
from remap.tuning.weights import registered, registered_at

_NAME = "remap_diffit"


class DiffFit(Method):
    """x + gamma1 * attn(norm1(x)), then x + gamma2 * mlp(norm2(x)), and all biases and norm weights train.

    The scales start at 1. They act on the outputs of the branches' last linear layers; LayerScale and drop-path, which
    come behind, commute with them. 140,544 parameters on ViT-B/16.
    """

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        names = dict.fromkeys([*bias_parameters(model, anatomy), *norm_parameters(model, anatomy)])
        ends: dict[str, Projection] = {}
        handles: list[RemovableHandle] = []
        for block in anatomy.blocks:
            assert isinstance(block, AttentionBlock)
            for word in ("o", "fc2"):
                end = block.projections[word]
                layer = module_at(model, end.path)
                like = registered(layer, "weight")
                gamma = BranchScale(block.width).to(device=like.device, dtype=like.dtype)
                path = f"{end.path}.{_NAME}"
                insert_module(model, path, gamma)
                handles.append(layer.register_forward_hook(partial(_scale_output, gamma)))
                ends[path] = end
        trainable = [*names, *inserted_parameters(model, ends)]
        return _Attached(model, anatomy, ends, trainable=trainable, no_decay=trainable, added=ends, handles=handles)


class BranchScale(nn.Module):
    """gamma (D,) of one branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class _Attached(Attached):
    fold_stage = 2

    def __init__(self, model: nn.Module, anatomy: Anatomy, ends: dict[str, Projection], **facts: object) -> None:
        self.ends = ends
        super().__init__(model, anatomy, mergeable=True, **facts)

    def _fold(self) -> None:
        for path, end in self.ends.items():
            gamma = module_at(self.model, path).gamma
            weight = registered_at(self.model, f"{end.path}.weight")
            weight.mul_(gamma.view(-1, *[1] * (weight.ndim - 1)))
            if end.bias is not None:
                registered_at(self.model, end.bias).mul_(gamma)


def _scale_output(scale: BranchScale, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return (output * scale.gamma).to(output.dtype)
