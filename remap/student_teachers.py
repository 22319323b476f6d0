"""Teachers made of the student: its backbone without the tuning, and its running average. Frozen weights are shared."""

import copy

import torch
from torch import nn

from remap.backbones.build import Backbone, fresh_head
from remap.network import Network, tuned


def untuned_twin(backbone: Backbone, classes: tuple[str, ...]) -> Network:
    """A network on the very tensors of a backbone that no method is attached to yet, with a classifier of its own.

    After the method is attached, ``keep_own`` gives it copies of what will be trained.
    """
    memo = {id(tensor): tensor for tensor in backbone.model.parameters()}
    memo |= {id(tensor): tensor for tensor in backbone.model.buffers()}
    model = copy.deepcopy(backbone.model, memo)
    for path in backbone.anatomy.heads_of_classifier:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, copy.deepcopy(backbone.model.get_submodule(path)))
    fresh_head(model, backbone.anatomy, len(classes))
    twin = Backbone(model, backbone.anatomy, backbone.preprocess, backbone.identity, head_is_fresh=True)
    network = tuned(twin, "linear", {})
    network.classes = classes
    return network


def keep_own(twin: Network, student: Network) -> None:
    """Give the twin its own copies of the backbone tensors that the student is going to change."""
    own = set(dict(twin.model.named_parameters())) | set(dict(twin.model.named_buffers()))
    with torch.no_grad():
        for name, tensor in student.tensors.items():
            if name in own and not student.anatomy.is_head(name):
                _put(twin.model, name, tensor.detach().clone())


def averaged_twin(student: Network) -> Network:
    """A copy of the tuned student that shares its frozen tensors, to hold a running average of the others."""
    changing = {id(tensor) for tensor in student.tensors.values()}
    everything = (*student.model.parameters(), *student.model.buffers())
    memo = {id(tensor): tensor for tensor in everything if id(tensor) not in changing}
    model = copy.deepcopy(student.model, memo)
    return Network(model, student.anatomy, student.preprocess, student.identity, student.attached, student.classes)


@torch.no_grad()
def average(twin: Network, student: Network, decay: float) -> None:
    """Move the twin's tensors towards the student's: decay * twin + (1 - decay) * student; counters are copied."""
    mine = twin.tensors
    for name, tensor in student.tensors.items():
        if tensor.is_floating_point():
            mine[name].lerp_(tensor, 1.0 - decay)
        else:
            mine[name].copy_(tensor)


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
