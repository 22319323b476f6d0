"""One forward pass for images of several tasks: each image gets the change of its own task's method.

What the tasks share, the frozen layers, runs once on all images. Where a task's method hooks into a module, its hooks
run on its own rows: the frozen layers' outputs are the same, and so is what each method makes of them.

Letters: B images, sorted by task; a tensor inside the network has B*k rows (k windows an image, else 1).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.typed import as_timm
from remap.remapping.knowledge.attention.attention_copy import CopiedMaps
from remap.tuning.prompt.sequence_prompts import Prompts

# Attributes that say nothing of what a backbone's forward computes.
_BOOKKEEPING = {
    "_modules",
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "training",
    "train",
    "num_classes",
}


def why_not_together(tuned: nn.Module, plain: nn.Module, anatomy: Anatomy) -> str | None:
    """Return why a tuned model cannot share a forward pass with others on the plain one; None where it can.

    It can where the method only adds hooks to frozen modules: LoRA, adapters, SSF, deep prompts and others.
    """
    if any(isinstance(m, Prompts) and m.own.stop < m.depth for m in tuned.modules()):
        return "its prompts pass from block to block"
    if any(isinstance(m, CopiedMaps) for m in tuned.modules()):
        return "its attention maps pass from block to block"
    if tuned._forward_hooks or tuned._forward_pre_hooks:
        return "it hooks into the complete network"
    others = dict(tuned.named_modules())
    for path, module in plain.named_modules():
        if anatomy.is_head(f"{path}."):
            continue
        other = others.get(path)
        if other is None or type(other) is not type(module) or _settings(other) != _settings(module):
            return f"it replaces what {path or 'the network'} computes"
        own = (*other._parameters.items(), *other._buffers.items())
        if any(
            tensor is not getattr(module, name, None) for name, tensor in own if not anatomy.is_head(_at(path, name))
        ):
            return f"it tunes {path} itself"
    return None


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that its forward may read: numbers and words, and which others there are."""
    values = {name: value for name, value in vars(module).items() if name not in _BOOKKEEPING and "_hooks" not in name}
    return {name: value if isinstance(value, int | float | str | tuple) else None for name, value in values.items()}


class Router:
    """The frozen layers of several tuned models, run once for rows of all of them.

    Args:
        trunk: A copy of the plain model on the shared tensors; its modules' forward methods are replaced.
        models: The tuned models by task, for which ``why_not_together`` is None.
    """

    def __init__(self, trunk: nn.Module, models: Mapping[str, nn.Module]) -> None:
        self.trunk, self.models = trunk, models
        self.counts: Sequence[tuple[str, int]] = ()
        hooked = {
            path
            for model in models.values()
            for path, module in model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        }
        for path, module in trunk.named_modules():
            if path in hooked:
                module.forward = partial(self._forward, path, module.forward)

    def features(self, pixels_BCHW: Tensor, counts: Sequence[tuple[str, int]]) -> list[Tensor]:
        """Return what ``forward_features`` of each task's model makes of its images.

        Args:
            counts: Tasks with their number of images, in the order of the images.
        """
        self.counts = counts
        features = as_timm(self.trunk).forward_features(pixels_BCHW)
        return [features[rows] for _, rows in self._rows(features)]

    def _rows(self, tensor: Tensor) -> Iterator[tuple[str, slice]]:
        times, start = len(tensor) // sum(count for _, count in self.counts), 0
        for task, count in self.counts:
            yield task, slice(start * times, (start + count) * times)
            start += count

    def _forward(self, path: str, shared: Any, *args: Any, **kwargs: Any) -> Tensor:
        modules, inputs = [], []
        for task, rows in self._rows(args[0]):
            modules.append(self.models[task].get_submodule(path))
            inputs.append(_before(modules[-1], (args[0][rows], *args[1:]), kwargs))
        firsts = [given[0] for given, _ in inputs]
        if len({first.shape[1:] for first in firsts}) == 1:
            joined, (rest, named) = torch.cat(firsts), (inputs[0][0][1:], inputs[0][1])
            outputs = list(shared(joined, *rest, **named).split([len(first) for first in firsts]))
        else:  # prompts of other numbers: inside of this module the sequences differ in length
            outputs = [module.forward(*given, **named) for module, (given, named) in zip(modules, inputs, strict=True)]
        triples = zip(modules, inputs, outputs, strict=True)
        return torch.cat([_after(module, *given, output) for module, given, output in triples])


def _before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Run a module's forward pre-hooks as its call does."""
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        elif (changed := hook(module, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Run a module's forward hooks as its call does."""
    for key, hook in module._forward_hooks.items():
        given = (args, kwargs) if key in module._forward_hooks_with_kwargs else (args,)
        changed = hook(module, *given, output)
        output = output if changed is None else changed
    return output
