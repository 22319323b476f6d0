"""What methods that Hugging Face peft implements share.

peft's public ``get_peft_model`` wraps a ``SharedLinear`` of every target in a model that is then thrown away; what it
made of that becomes the change of the backbone's own layer (``peft_layer.py``).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import NO_HOOKS, Attachment, Method, Options, TrainingHooks
from remap.tuning.layers import Layer, Target, layers_of
from remap.tuning.parameter.peft_layer import Run, SharedLinear, attach_changes, plain_run, shared_linears
from remap.tuning.weights import require_rank

ADAPTER = "default"

# The projections that a layer makes.
Words = tuple[str, ...]


class Targets(Options):
    """A fused q, k, v layer is one layer, changed as a whole if any of the three is a target.

    fc1 takes the gate of a gated MLP along.
    """

    targets: tuple[Target, ...] | None = Field(
        default=None,
        min_length=1,
        description="Layers to change; null is [q, k, v], or [fc1, fc2] without attention, or [linear].",
    )


class LowRank(Targets):
    """Options of a scaled low-rank update."""

    rank: int = Field(default=8, ge=1, description="Rank of the update.")
    alpha: float | None = Field(default=None, gt=0.0, description="Scale is alpha / rank; null is alpha = rank.")

    @property
    def alpha_or_rank(self) -> float:
        """What peft calls alpha."""
        return self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class PeftOptions:
    """A class of options of peft, which of them come from which of the method's, and values of others."""

    kind: Callable[..., PeftConfig]
    taken: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)


class PeftMethod(Method):
    """What the methods share.

    Attributes:
        name: Last component of the inserted modules' names.
        peft: What peft is given.
        default_targets: Words that ``targets: null`` stands for.
        shared: Attributes of peft's layers that hold the same frozen tensors everywhere.
        moves_bias: Whether the layer's bias is changed too.
        exempt: Names of peft's parameters that weight decay must leave alone, besides vectors.
        exact_start: Whether the output is bit-equal right after attaching.
        rank_option: The option whose size the layers limit, None where they limit none.
        rank_within: The features that limit it: those of inputs only where it counts vectors of inputs.
    """

    name: ClassVar[str]
    peft: ClassVar[PeftOptions]
    default_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    shared: ClassVar[tuple[str, ...]] = ()
    moves_bias: ClassVar[bool] = False
    exempt: ClassVar[tuple[str, ...]] = ()
    exact_start: ClassVar[bool] = True
    rank_option: ClassVar[str | None] = "rank"
    rank_within: ClassVar[Literal["both", "inputs"]] = "both"
    run: ClassVar[Run] = staticmethod(plain_run)

    Config: type[Targets] = Targets
    config: Targets

    def peft_config(self, names: dict[str, Words]) -> PeftConfig:
        """Return peft's configuration for target modules of these names, which make these projections."""
        settings: dict[str, Any] = {theirs: getattr(self.config, ours) for theirs, ours in self.peft.taken.items()}
        return self.peft.kind(**settings, **self.peft.fixed, target_modules=list(names))

    def training_hooks(self, changes: list[nn.Module]) -> TrainingHooks:
        """Return what the method does in the course of training with peft's layers."""
        return NO_HOOKS

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        layers = layers_of(anatomy, self.config.targets, self.default_targets)
        linears = shared_linears(model, layers)
        if rank := getattr(self.config, self.rank_option or "", None):
            for layer, linear in zip(layers, linears, strict=True):
                shape = (linear.out_features, linear.in_features)
                require_rank(rank, min(shape) if self.rank_within == "both" else shape[1], layer.path, shape)
        changes = self._wrap(linears, layers)
        attachment = attach_changes(
            model,
            self.name,
            layers,
            changes,
            common=self.shared,
            moves_bias=self.moves_bias,
            run=self.run,
            no_decay=self.exempt,
            identity_at_init=self.exact_start,
        )
        return replace(attachment, hooks=self.training_hooks(changes))

    def _wrap(self, linears: Sequence[SharedLinear], layers: Sequence[Layer]) -> list[nn.Module]:
        """Return peft's layers around the shared ones."""
        names = {f"layer{index:04}": layer.words for index, layer in enumerate(layers)}
        holder = nn.ModuleDict(dict(zip(names, linears, strict=True)))
        # peft freezes what it wraps, which is the backbone's own tensors: Attached decides on those.
        before = {p: p.requires_grad for p in holder.parameters()}
        try:
            for parameter in before:
                parameter.requires_grad_(False)
            config = self.peft_config(names)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # see OFT
                get_peft_model(holder, config, adapter_name=ADAPTER)
        except ValueError as error:
            raise BackboneError(
                f"these options of {self.name.removeprefix('remap_')} do not fit the layers", given=str(error)
            ) from error
        finally:
            for parameter, required in before.items():
                parameter.requires_grad_(required)
        changes = [holder[name] for name in names]
        for layer, change in zip(layers, changes, strict=True):
            trained = [p for p in change.parameters() if p.requires_grad and p not in before]
            if not isinstance(change, BaseTunerLayer) or not trained:
                raise BackboneError(f"peft did not adapt {layer.path}", given=type(change).__name__)
        return changes
