"""Changes of linear layers that can be written into their weights (LoRA and its relatives).

Letters: B images, T rows (all leading dimensions), i input and o output features of the changed rows.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from remap.backbones.anatomy import PLAIN_CLASS, Projection, module_at, plain_class
from remap.errors import BackboneError
from remap.tuning.base import INSERTED, Attachment, Edits, Fold
from remap.tuning.dropout import SampleDropout
from remap.tuning.layers import by_layer

# Where a module keeps what reads of its tensors go through: {tensor's name: functions}.
_FUNCTIONS = "_remap_recomputed"


class Delta(nn.Module):
    """A change of one linear map: y = W x + b becomes y = (W + delta) x + b.

    The two ways to apply it must agree: ``forward`` is the cheap one where the layer is called, ``delta`` is added to
    the weight on merging, and wherever the backbone reads the weight instead of calling the layer.
    """

    @abstractmethod
    def delta(self) -> Tensor:
        """Return (o, i), in the dtype of the method's parameters; without dropout."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map (..., i) to (..., o), what is added to the layer's output, in the dtype of ``x`` or of autocast."""


def attach_deltas(edits: Edits, deltas: Mapping[Projection, Delta]) -> Attachment:
    """Let the projections' layers give W x + b + delta(x) in their rows; the deltas are inserted already.

    They come before all else that changes the layers' outputs or weights, in every order in which methods are
    attached: a scale acts on the sum.
    """
    for path, projections in by_layer(deltas).items():
        rows = [(projection, deltas[projection]) for projection in projections]
        if all(projection.called for projection in projections):
            edits.after(path, partial(_add_to_output, rows), first=True)
        else:
            recompute_at(edits, f"{path}.weight", partial(_add_to_weight, rows), first=True)
    return Attachment(edits, fold=Fold(partial(_fold_deltas, edits.model, deltas)))


def _fold_deltas(model: nn.Module, deltas: Mapping[Projection, Delta]) -> None:
    """Add every delta to its rows of the registered weight."""
    for projection, delta in deltas.items():
        weight = registered(module_at(model, projection.path), "weight")
        weight[projection.rows] += delta.delta().reshape(weight[projection.rows].shape).to(weight.dtype)


def recompute(
    module: nn.Module, name: str, function: Callable[[Tensor], Tensor], *, first: bool = False
) -> Callable[[], None]:
    """Let every read of ``module.name`` (a parameter or buffer) give ``function(tensor)``.

    For tensors that are read past their own module's forward. The registered tensor stays where it is, so names,
    state dict and optimiser do not change; ``registered`` gives it. Functions of one tensor are applied in the order
    in which they came. The module's class becomes a subclass of its own class; ``plain_class`` gives that.

    Args:
        function: Copied along by ``copy.deepcopy``: a bound method, or a partial of a module-level function.
        first: Apply it before those that are there already.

    Returns:
        A function that undoes it, in any order with others.

    Raises:
        BackboneError: The module's forward was replaced by one that reads the registered tensors (``peft_layer.py``).
    """
    if isinstance(module.__dict__.get("forward"), partial):
        raise BackboneError(
            f"two methods of this combination want to change the {name} of one layer, and one of them would be lost",
            given=", ".join(child for child, _ in module.named_children() if child.startswith(INSERTED)),
            do="give that method other targets, or leave one of the two out",
        )
    functions: dict[str, tuple] = module.__dict__.setdefault(_FUNCTIONS, {})
    others = functions.get(name, ())
    functions[name] = (function, *others) if first else (*others, function)
    _set_class(module)

    def undo() -> None:
        left = list(functions[name])
        del left[next(index for index, other in enumerate(left) if other is function)]
        functions[name] = tuple(left)
        if not left:
            del functions[name]
        _set_class(module)

    return undo


def recompute_at(edits: Edits, path: str, function: Callable[[Tensor], Tensor], *, first: bool = False) -> None:
    """``recompute`` the tensor at a dotted path until the edits are removed."""
    owner, _, name = path.rpartition(".")
    edits.undo_by(recompute(module_at(edits.model, owner), name, function, first=first))


def registered(module: nn.Module, name: str) -> Tensor:
    """Return the tensor that a module registered under ``name``, however reading it was changed."""
    tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
    assert tensor is not None, name
    return tensor


def registered_at(model: nn.Module, path: str) -> Tensor:
    """Return the registered parameter or buffer at a dotted path."""
    parent, _, name = path.rpartition(".")
    return registered(module_at(model, parent), name)


def weight_of(model: nn.Module, projection: Projection) -> Tensor:
    """Return the registered weight of a projection's layer, all its rows; dimension 1 counts input features."""
    return registered(module_at(model, projection.path), "weight")


def own_bias(model: nn.Module, projection: Projection) -> nn.Parameter | None:
    """Return the parameter that holds a projection's bias.

    None also where that is a buffer (the key bias fixed at 0 in BEiT and EVA-02), which plain weights may leave out.
    """
    bias = None if projection.bias is None else registered_at(model, projection.bias)
    return bias if isinstance(bias, nn.Parameter) else None


def require_rank(rank: int, limit: int, path: str, shape: tuple[int, int]) -> None:
    """Raise a BackboneError for a rank above ``limit``; ``shape`` is (outputs, inputs) of what is changed."""
    if rank > limit:
        raise BackboneError(
            f"rank {rank} is larger than the layer: {shape[0]} x {shape[1]}", given=path, allowed=f"1 to {limit}"
        )


def channels_first(module: nn.Module) -> bool:
    """Return whether a layer's channels are dimension 1 of its output ((B, C, H, W)) instead of the last one."""
    return "2d" in plain_class(module).__name__ or isinstance(module, nn.Conv2d | nn.GroupNorm)


def drop(dropout: SampleDropout, x: Tensor) -> Tensor:
    """Apply dropout keyed by image to a tensor whose rows belong to images one after the other.

    Window attention, whose leading dimension is (images * windows), and tensors flattened to rows are such.
    """
    if dropout.keys_B is None or not dropout.training:
        return dropout(x)
    return dropout(x.reshape(len(dropout.keys_B), -1)).reshape(x.shape)


# One class for all modules of a kind, so that compiled code for one block serves the others.
_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _set_class(module: nn.Module) -> None:
    names, plain = tuple(sorted(module.__dict__[_FUNCTIONS])), plain_class(module)
    if not names:
        module.__class__ = plain
        del module.__dict__[_FUNCTIONS]
        return
    if (plain, names) not in _classes:
        properties = {name: property(partial(_read, name=name)) for name in names}
        _classes[plain, names] = type(f"Recomputed{plain.__name__}", (plain,), {**properties, PLAIN_CLASS: plain})
    module.__class__ = _classes[plain, names]


def _read(module: nn.Module, name: str) -> Tensor:
    tensor = registered(module, name)
    if isinstance(tensor, DTensor):  # divided among processes; a complete tensor replaces it before it is computed with
        return tensor
    try:
        for function in module.__dict__[_FUNCTIONS][name]:
            tensor = function(tensor)
    except AttributeError as error:  # Python would go on to the registered tensor, and the change would be lost
        raise RuntimeError(f"recomputing {name} failed: {error}") from error
    return tensor


def _add_to_output(rows: Sequence[tuple[Projection, Delta]], layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a called layer; ``rows`` in ascending order."""
    if channels_first(layer):  # a 1x1 convolution
        changed = _add_to_last(rows, args[0].movedim(1, -1), output.movedim(1, -1))
        return changed.movedim(-1, 1)
    return _add_to_last(rows, args[0], output)


def _add_to_last(rows: Sequence[tuple[Projection, Delta]], x: Tensor, output: Tensor) -> Tensor:
    changes = [(projection.start, projection.stop, delta(x)) for projection, delta in rows]
    return _with_changes(output, changes, -1)


def _add_to_weight(rows: Sequence[tuple[Projection, Delta]], weight: Tensor) -> Tensor:
    changes = [
        (projection.start, projection.stop, delta.delta().reshape(-1, *weight.shape[1:]).to(weight.dtype))
        for projection, delta in rows
    ]
    return _with_changes(weight, changes, 0)


def _with_changes(tensor: Tensor, changes: Sequence[tuple[int, int, Tensor]], dim: int) -> Tensor:
    """Return ``tensor`` plus a change in each range of one dimension; the ranges ascend."""
    if len(changes) == 1 and changes[0][2].shape[dim] == tensor.shape[dim]:
        return tensor + changes[0][2]
    # One sum: a slice of the tensor for every piece would cost a full gradient of zeros each.
    pieces, end = [], 0
    for start, stop, change in changes:
        pieces += [_zeros(change, dim, start - end), change]
        end = stop
    pieces.append(_zeros(change, dim, tensor.shape[dim] - end))
    return tensor + torch.cat([piece for piece in pieces if piece.shape[dim]], dim)


def _zeros(like: Tensor, dim: int, size: int) -> Tensor:
    """Return zeros in the shape of ``like`` but for one dimension, which take no memory."""
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(()).expand(shape)


def full_precision(like: Tensor) -> torch.autocast:
    """Switch autocast off for the device of a tensor."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
