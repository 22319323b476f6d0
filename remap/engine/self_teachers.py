"""Teachers made of the student: its backbone without the tuning, and its running average. Frozen weights are shared."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remap.backbones.build import Backbone, fresh_head
from remap.network import Network, tuned


def untuned_copy(backbone: Backbone, classes: tuple[str, ...]) -> Network:
    """A network on the very tensors of a backbone that no method is attached to yet, with a classifier of its own.

    After the method is attached, ``copy_trained_tensors`` gives it copies of what will be trained.
    """
    memo = {id(tensor): tensor for tensor in backbone.model.parameters()}
    memo |= {id(tensor): tensor for tensor in backbone.model.buffers()}
    model = copy.deepcopy(backbone.model, memo)
    for path in backbone.anatomy.classifier_heads:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, copy.deepcopy(backbone.model.get_submodule(path)))
    fresh_head(model, backbone.anatomy, len(classes))
    twin = Backbone(model, backbone.anatomy, backbone.preprocess, backbone.identity, head_is_fresh=True)
    network = tuned(twin, "linear", {})
    network.classes = classes
    return network


def copy_trained_tensors(twin: Network, student: Network) -> None:
    """Give the twin its own copies of the backbone tensors that the student is going to change."""
    own = set(dict(twin.model.named_parameters())) | set(dict(twin.model.named_buffers()))
    with torch.no_grad():
        for name, tensor in student.tensors.items():
            if name in own and not student.anatomy.is_head(name):
                _put(twin.model, name, tensor.detach().clone())


def averaged_copy(student: Network) -> Network:
    """A copy of the tuned student that shares its frozen tensors, to hold a running average of the others."""
    changing = {id(tensor) for tensor in student.tensors.values()}
    everything = (*student.model.parameters(), *student.model.buffers())
    memo = {id(tensor): tensor for tensor in everything if id(tensor) not in changing}
    model = copy.deepcopy(student.model, memo)
    return Network(model, student.anatomy, student.preprocess, student.identity, student.attached, student.classes)


def pairs_of(twin: Network, student: Network) -> list[tuple[Tensor, Tensor]]:
    """What ``move_average`` moves and where to: the twin's own tensors, each with the student's of the same name."""
    mine = twin.tensors
    return [(mine[name], tensor) for name, tensor in student.tensors.items()]


@torch.no_grad()
def move_average(pairs: Sequence[tuple[Tensor, Tensor]], decay: float) -> None:
    """Move the first of each pair towards the second: decay * first + (1 - decay) * second; counters are copied."""
    for mine, theirs in pairs:
        if mine.is_floating_point():
            mine.lerp_(theirs, 1.0 - decay)
        else:
            mine.copy_(theirs)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
