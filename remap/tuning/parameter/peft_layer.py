"""Changes of a linear layer that are more than an addition to its output (DoRA, OFT, IA3 and others).

Such a change is a module with the frozen layer inside, as Hugging Face peft writes them: y = change(x) calls the
layer or reads its weight somewhere on the way. Here the layer inside is a ``SharedLinear`` with the backbone's tensors,
so the backbone's own layer stays at its path: its forward goes through the change, which in turn calls the shared one.

Letters: i input and o output features of a layer.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Projection, module_at, plain_class
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Fold
from remap.tuning.layers import Layer
from remap.tuning.weights import channels_first, full_precision, recompute_at, registered, registered_at

# Called as run(change, x); ``bias`` may be handed on to the shared layer.
Run = Callable[..., Tensor]


class SharedLinear(nn.Linear):
    """A linear layer with the tensors of another (or of a 1x1 convolution), past its hooks and its forward.

    It holds the very dictionary in which the other keeps its parameters, so moving, converting, loading and
    deep-copying the model reach it.
    """

    without_bias = False

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__["_parameters"] = layer._parameters
        self.out_features, self.in_features = self.weight.shape
        self.channels_first = channels_first(layer)

    # Read from the shared dictionary at every use: it has the tensors of now, and those of convolutions are flattened.
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(o, i)."""
        weight = registered(self, "weight")
        return weight if weight.ndim == 2 else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(o,), None where there is none."""
        return None if self.without_bias else self._parameters.get("bias")

    def forward(self, x: Tensor, bias: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Map (..., i) to (..., o); ``bias`` (o,) and ``weight`` (o, i) stand in for the layer's own."""
        bias = self.bias if bias is None else bias
        weight = registered(self, "weight") if weight is None else weight
        if not self.channels_first or x.ndim < 3:
            return F.linear(x, weight.flatten(1), bias)
        # The convolution itself, which rounds in its own way: (..., H, W, i) or (B, T, i).
        image_BHWi = x.reshape(-1, *x.shape[-3:]) if x.ndim > 3 else x.unsqueeze(-2)
        out_BoHW = F.conv2d(image_BHWi.movedim(-1, 1), weight.view(*self.weight.shape, 1, 1), bias)
        return out_BoHW.movedim(1, -1).reshape(*x.shape[:-1], self.out_features)


def shared_linears(model: nn.Module, layers: Iterable[Layer]) -> list[SharedLinear]:
    """Return a layer with the tensors of each.

    Raises:
        BackboneError: Another method changes the layer already; folding both would depend on the order.
    """
    shared = []
    for target in layers:
        layer = module_at(model, target.path)
        plain = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        spatial = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        if not isinstance(layer, plain) or (spatial and target.called):
            raise BackboneError(f"{target.path} is not a linear layer", given=type(layer).__name__)
        recomputed = plain_class(layer) is not type(layer)
        if layer._forward_hooks or "forward" in layer.__dict__ or recomputed:
            # Behind a method of this kind none of the same kind can go, and none that is read past the hooks.
            never = any(hasattr(child, "base_layer") for child in layer.children()) or (recomputed and target.called)
            raise BackboneError(
                "the model already carries a tuning method on a layer that this one wants to change",
                given=target.path,
                do="give the two different targets"
                if never
                else "name this method first in the combination, or give the two different targets",
            )
        shared.append(SharedLinear(layer))
    return shared


def plain_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """Call the module itself."""
    return change(x, **bias)


def attach_changes(
    model: nn.Module,
    name: str,
    layers: Sequence[Layer],
    changes: Sequence[nn.Module],
    *,
    common: Collection[str] = (),
    moves_bias: bool = False,
    run: Run = plain_run,
) -> Attachment:
    """Let each layer's forward go through its change.

    Args:
        name: Last component of the inserted modules' names.
        changes: In the order of ``layers``; ``base_layer`` of each is a ``SharedLinear``, which becomes invisible to
            ``named_parameters`` and ``state_dict``.
        common: Attributes under which all changes hold the same modules; those are inserted once, into the model.
        moves_bias: Whether the changes also act on what is added to W x.
        run: How a change is called.
    """
    edits = Edits(model)
    if common:
        modules = nn.ModuleDict({word: changes[0].get_submodule(word) for word in common})
        edits.insert(name, modules, registered_at(model, f"{layers[0].path}.weight"))
    for layer, change in zip(layers, changes, strict=True):
        for hidden in ("base_layer", *common):
            change.__dict__[hidden] = change._modules.pop(hidden)
        edits.insert(f"{layer.path}.{name}", change, registered_at(model, f"{layer.path}.weight"))
        _install(edits, layer, change, run, moves_bias)
    return Attachment(edits, fold=Fold(partial(_fold, model, layers, changes, common, run, moves_bias)))


def _install(edits: Edits, layer: Layer, change: nn.Module, run: Run, moves_bias: bool) -> None:
    module = module_at(edits.model, layer.path)
    if layer.called:
        module.forward = partial(_forward, run, change)
        edits.undo_by(partial(delattr, module, "forward"))
    else:
        recompute_at(edits, f"{layer.path}.weight", partial(_changed_weight, run, change))
    for projection, path in layer.foreign_biases if moves_bias else ():
        recompute_at(edits, path, partial(_changed_bias, run, change, projection))


def _fold(
    model: nn.Module,
    layers: Sequence[Layer],
    changes: Sequence[nn.Module],
    common: Collection[str],
    run: Run,
    moves_bias: bool,
) -> None:
    for layer, change in zip(layers, changes, strict=True):
        module = module_at(model, layer.path)
        # In float64: matrix units that round to 10 bits would round the whole weight, not only the change.
        exact = _exact_copy(change, common)
        base = base_of(exact)
        weight = registered(module, "weight")
        weight.copy_(_weight(run, exact).reshape(weight.shape))
        if not moves_bias:
            continue
        if layer.called and (own := module._parameters.get("bias")) is not None:
            base.without_bias = False
            own.copy_(run(exact, base.weight.new_zeros(1, base.in_features))[0])
        for projection, path in layer.foreign_biases:
            bias = registered_at(model, path)
            bias.copy_(_changed_bias(run, exact, projection, bias.to(base.weight)))


def _exact_copy(change: nn.Module, common: Collection[str]) -> nn.Module:
    """Copy a change in float64, with a shared layer that has no bias."""
    exact = copy.deepcopy(change)
    device = base_of(exact).weight.device
    target = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    for part in (exact, base_of(exact), *(exact.__dict__[name] for name in common)):
        part.to(target, torch.float64)
    base_of(exact).without_bias = True
    return exact


def base_of(change: nn.Module) -> SharedLinear:
    """Return the layer inside a change."""
    base = change.base_layer
    assert isinstance(base, SharedLinear)
    return base


def _forward(run: Run, change: nn.Module, x: Tensor) -> Tensor:
    """Run a change in place of the forward of the backbone's layer."""
    if base_of(change).channels_first:
        return run(change, x.movedim(1, -1)).movedim(-1, 1)
    return run(change, x)


def _weight(run: Run, change: nn.Module) -> Tensor:
    """Return (o, i): what the change makes of a layer without bias, from its outputs for the unit vectors."""
    weight = base_of(change).weight
    return run(change, torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)).T


def _changed_weight(run: Run, change: nn.Module, weight: Tensor) -> Tensor:
    """Change a weight that is read past the layer, which then has no bias."""
    units = torch.eye(base_of(change).in_features, device=weight.device, dtype=weight.dtype)
    with full_precision(weight):
        # The difference first: however the matrix units round, an untrained change is exactly none.
        return weight + (run(change, units) - base_of(change)(units)).T.reshape(weight.shape)


def _changed_bias(run: Run, change: nn.Module, projection: Projection, bias: Tensor) -> Tensor:
    """Change a bias outside the layer that is added to some rows of its output."""
    size = projection.stop - projection.start
    rows = slice(projection.bias_start, projection.bias_start + size)
    padded = F.pad(bias[rows], (projection.start, base_of(change).out_features - projection.stop))
    nothing = bias.new_zeros(1, base_of(change).in_features)
    with full_precision(bias):
        changed = run(change, nothing, bias=padded)[0, projection.start : projection.stop]
    return torch.cat([bias[: rows.start], changed, bias[rows.stop :]])
