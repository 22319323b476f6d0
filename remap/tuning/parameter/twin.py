"""Changes of a linear layer that are more than an addition to its output (DoRA, OFT, IA3 and others).

Such a change is a module with the frozen layer inside, as Hugging Face peft writes them: y = change(x) calls the
layer or reads its weight somewhere on the way. Here the layer inside is a ``Twin`` that shares the backbone's tensors,
so the backbone's own layer stays at its path: its forward goes through the change, which in turn asks the twin.

Letters: i input and o output features of a layer.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, Projection, module_at, plain_class
from remap.errors import BackboneError
from remap.tuning.base import Attached, insert_module, inserted_parameters, vectors
from remap.tuning.weights import channels_first, recompute, registered, registered_at

Word = Literal["q", "k", "v", "o", "fc1", "fc2"]
# Called as run(change, x); ``bias`` may be handed on to the twin.
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Site:
    """One linear layer to be changed as a whole, and the projections that are rows of it (q, k, v where fused)."""

    path: str
    words: tuple[str, ...]
    projections: tuple[Projection, ...]

    @property
    def called(self) -> bool:
        return all(projection.called for projection in self.projections)

    @property
    def foreign_biases(self) -> tuple[Projection, ...]:
        """Projections whose bias is not the layer's own."""
        return tuple(p for p in self.projections if p.bias is not None and p.bias != f"{self.path}.bias")


def sites_of(anatomy: Anatomy, words: Sequence[str] | None, default: Sequence[str] = ("q", "k", "v")) -> list[Site]:
    """The layers behind ``words``, in the order of the blocks; every projection in a layer belongs to its site.

    Args:
        words: None for those of ``default`` that the backbone has, or fc1 and fc2 where it has none of them.

    Raises:
        BackboneError: No block has a projection of some word.
    """
    has = {word for block in anatomy.blocks for word in block.projections}
    if words is None:
        words = [word for word in default if word in has] or ["fc1", "fc2"]
    for word in words:
        if word not in has:
            raise BackboneError(
                f"no block of this backbone has a layer called {word}",
                given=f"targets: {', '.join(words)}",
                allowed=", ".join(sorted(has)),
            )
    # A gate of an MLP goes with the layer it multiplies.
    wanted = {*words, "fc1_gate"} if "fc1" in words else set(words)
    sites: list[Site] = []
    for block in anatomy.blocks:
        for path in dict.fromkeys(p.path for word, p in block.projections.items() if word in wanted):
            own = {word: p for word, p in block.projections.items() if p.path == path}
            sites.append(Site(path, tuple(own), tuple(own.values())))
    return sites


class Twin(nn.Linear):
    """A linear layer with the tensors of another (or of a 1x1 convolution), past its hooks and its forward.

    It holds the very dictionary in which the other keeps its parameters, so moving, converting, loading and
    deep-copying the model reach the twin.
    """

    without_bias = False

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__["_parameters"] = layer._parameters
        self.out_features, self.in_features = self.weight.shape
        self.channels_first = channels_first(layer)

    @property
    def weight(self) -> Tensor:
        weight = self._parameters["weight"]
        return weight if weight.ndim == 2 else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        return None if self.without_bias else self._parameters.get("bias")

    def forward(self, x: Tensor, bias: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """``bias`` (o,) and ``weight`` (o, i) stand in for the layer's own."""
        bias = self.bias if bias is None else bias
        weight = self._parameters["weight"] if weight is None else weight
        if not self.channels_first or x.ndim < 3:
            return F.linear(x, weight.flatten(1), bias)
        # The convolution itself, which rounds in its own way: (..., H, W, i) or (B, T, i).
        image_BHWi = x.reshape(-1, *x.shape[-3:]) if x.ndim > 3 else x.unsqueeze(-2)
        out_BoHW = F.conv2d(image_BHWi.movedim(-1, 1), weight.view(*self.weight.shape, 1, 1), bias)
        return out_BoHW.movedim(1, -1).reshape(*x.shape[:-1], self.out_features)


def twins_of(model: nn.Module, sites: Iterable[Site]) -> list[Twin]:
    """One twin a site.

    Raises:
        BackboneError: Another method changes the layer already; folding both would depend on the order.
    """
    twins = []
    for site in sites:
        layer = module_at(model, site.path)
        plain = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        if not isinstance(layer, plain) or (plain is nn.Conv2d and layer.kernel_size != (1, 1)):
            raise BackboneError(f"{site.path} is no linear layer", given=type(layer).__name__)
        recomputed = plain_class(layer) is not type(layer)
        if layer._forward_hooks or "forward" in layer.__dict__ or recomputed:
            # Behind a method of this kind none of the same kind can go, and none that is read past the hooks.
            never = any(hasattr(child, "base_layer") for child in layer.children()) or (recomputed and site.called)
            raise BackboneError(
                "the model already carries a tuning method on a layer that this one wants to change",
                given=site.path,
                do="give the two different targets"
                if never
                else "name this method first in the combination, or give the two different targets",
            )
        twins.append(Twin(layer))
    return twins


def plain_run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
    """The module itself."""
    return change(x, **bias)


class TwinAttached(Attached):
    """An attached method that is one change a site.

    Args:
        changes: In the order of ``sites``; ``base_layer`` of each is a ``Twin``, which becomes invisible to
            ``named_parameters`` and ``state_dict``.
        shared: Modules that all changes hold under the same name, as attributes; inserted once, into the model.
        moves_bias: Whether the changes also act on what is added to W x.
        run: How a change is called.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        name: str,
        sites: Sequence[Site],
        changes: Sequence[nn.Module],
        *,
        shared: Mapping[str, nn.Module] | None = None,
        moves_bias: bool = False,
        run: Run = plain_run,
        no_decay: Sequence[str] = (),
        **facts: object,
    ) -> None:
        self.sites, self.changes = list(sites), list(changes)
        self.run, self.moves_bias = run, moves_bias
        self.shared = dict(shared or {})
        added, undo = [], []
        if self.shared:
            like = registered(module_at(model, sites[0].path), "weight")
            insert_module(model, name, nn.ModuleDict(self.shared).to(like.device, like.dtype))
            added.append(name)
        for site, change in zip(sites, changes, strict=True):
            layer = module_at(model, site.path)
            weight = registered(layer, "weight")
            for hidden in ("base_layer", *self.shared):
                change.__dict__[hidden] = change._modules.pop(hidden)
            insert_module(model, f"{site.path}.{name}", change.to(weight.device, weight.dtype))
            added.append(f"{site.path}.{name}")
            undo += self._install(model, site, layer, change)
        parameters = inserted_parameters(model, added)
        exempt = {*vectors(parameters), *(n for n in parameters if set(n.split(".")) & set(no_decay))}
        super().__init__(
            model,
            anatomy,
            trainable=parameters,
            no_decay=[n for n in parameters if n in exempt],
            mergeable=True,
            added=added,
            undo=undo,
            **facts,
        )

    def _install(self, model: nn.Module, site: Site, layer: nn.Module, change: nn.Module) -> list[Callable[[], None]]:
        undo = []
        if site.called:
            layer.forward = partial(_forward, self.run, change)
            undo.append(partial(delattr, layer, "forward"))
        else:
            undo.append(recompute(layer, "weight", partial(_changed_weight, self.run, change)))
        for projection in site.foreign_biases if self.moves_bias else ():
            owner, _, bias = projection.bias.rpartition(".")
            function = partial(_changed_bias, self.run, change, projection)
            undo.append(recompute(module_at(model, owner), bias, function))
        return undo

    def _fold(self) -> None:
        for site, change in zip(self.sites, self.changes, strict=True):
            layer = module_at(self.model, site.path)
            # In float64: matrix units that round to 10 bits would round the whole weight, not only the change.
            exact = self._copy(change)
            weight = registered(layer, "weight")
            weight.copy_(_weight(self.run, exact).reshape(weight.shape))
            if not self.moves_bias:
                continue
            if site.called and layer.bias is not None:
                exact.base_layer.without_bias = False
                nothing = exact.base_layer.weight.new_zeros(1, exact.base_layer.in_features)
                layer.bias.copy_(self.run(exact, nothing)[0])
            for projection in site.foreign_biases:
                bias = registered_at(self.model, projection.bias)
                bias.copy_(_changed_bias(self.run, exact, projection, bias.to(exact.base_layer.weight)))

    def _copy(self, change: nn.Module) -> nn.Module:
        """A change in float64 of its own, whose twin has no bias."""
        exact = copy.deepcopy(change)
        device = exact.base_layer.weight.device
        place = "cpu" if device.type == "mps" else device  # which has no float64
        for part in (exact, exact.base_layer, *(getattr(exact, name) for name in self.shared)):
            part.to(place, torch.float64)
        exact.base_layer.without_bias = True
        return exact


def _forward(run: Run, change: nn.Module, x: Tensor) -> Tensor:
    """What the backbone's layer does instead of its own forward."""
    if change.base_layer.channels_first:
        return run(change, x.movedim(1, -1)).movedim(-1, 1)
    return run(change, x)


def _weight(run: Run, change: nn.Module) -> Tensor:
    """(o, i): what the change makes of a layer without bias, from its outputs for the unit vectors."""
    weight = change.base_layer.weight
    return run(change, torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)).T


def _changed_weight(run: Run, change: nn.Module, weight: Tensor) -> Tensor:
    """For weights that are read past the layer, which then has no bias of its own."""
    units = torch.eye(change.base_layer.in_features, device=weight.device, dtype=weight.dtype)
    with full_precision(weight):
        # The difference first: whatever the matrix units round, an untrained change is exactly none.
        return weight + (run(change, units) - change.base_layer(units)).T


def _changed_bias(run: Run, change: nn.Module, projection: Projection, bias: Tensor) -> Tensor:
    """For a bias outside the layer that is added to some rows of its output."""
    size = projection.stop - projection.start
    rows = slice(projection.bias_start, projection.bias_start + size)
    whole = F.pad(bias[rows], (projection.start, change.base_layer.out_features - projection.stop))
    nothing = bias.new_zeros(1, change.base_layer.in_features)
    with full_precision(bias):
        changed = run(change, nothing, bias=whole)[0, projection.start : projection.stop]
    return torch.cat([bias[: rows.start], changed, bias[rows.stop :]])


def full_precision(like: Tensor) -> torch.autocast:
    """No autocast."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
