"""Networks for teachers made of the student: its backbone without the method, and a copy for its moving average.

Both share the student's frozen tensors.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from remap.backbones.build import Backbone, fresh_head
from remap.network import Network, tuned


def untuned_copy(backbone: Backbone, classes: tuple[str, ...]) -> Network:
    """Return a network on the tensors of a backbone that no method is attached to yet, with its own classifier.

    After the method is attached, ``copy_trained_tensors`` gives it copies of what will be trained.
    """
    # deepcopy takes what is in its memo as copied already, so these tensors are shared.
    memo: dict[int, Tensor] = {id(tensor): tensor for tensor in backbone.model.parameters()}
    memo |= {id(tensor): tensor for tensor in backbone.model.buffers()}
    # Tensors in the memo are shared, only the structure is copied.
    model = copy.deepcopy(backbone.model, memo)
    # The teacher's classifier is fitted apart from the student's.
    for path in backbone.anatomy.classifier_heads:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, copy.deepcopy(backbone.model.get_submodule(path)))
    fresh_head(model, backbone.anatomy, len(classes))
    untuned = Backbone(model, backbone.anatomy, backbone.preprocess, backbone.identity, head_is_fresh=True)
    network = tuned(untuned, "linear", {})
    network.classes = classes
    return network


@torch.no_grad()
def copy_trained_tensors(teacher: Network, student: Network) -> None:
    """Replace the shared backbone tensors that the student is going to change by copies in the teacher."""
    names = {name for name, _ in (*teacher.model.named_parameters(), *teacher.model.named_buffers())}
    for name, tensor in student.tensors.items():
        # The teacher has no modules that the method inserted, and a head of its own already.
        if name in names and not student.anatomy.is_head(name):
            _replace(teacher.model, name, tensor.detach().clone())


def averaged_copy(student: Network) -> Network:
    """Return a copy of the tuned student that shares its frozen tensors, for ``AverageTeacher``."""
    changing = {id(tensor) for tensor in student.tensors.values()}
    everything: tuple[Tensor, ...] = (*student.model.parameters(), *student.model.buffers())
    memo = {id(tensor): tensor for tensor in everything if id(tensor) not in changing}
    model = copy.deepcopy(student.model, memo)
    return replace(student, model=model, attention_kernel="")


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
