"""What the methods that Hugging Face peft implements share; ``peft_rows.py`` has a row for each.

peft's public ``get_peft_model`` wraps a ``SharedLinear`` of every target in a model that is then thrown away; what it
made of that becomes the change of the backbone's own layer (``peft_layer.py``).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import peft
import torch
from peft import PeftConfig, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import create_model
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import NO_HOOKS, Attachment, Method, Options, TrainingHooks
from remap.tuning.layers import Layer, LayerTargets, layers_of
from remap.tuning.parameter.peft_layer import Run, attach_changes, base_of, plain_run, shared_linears
from remap.tuning.parameter.peft_rows import PeftEntry, PeftLayer
from remap.tuning.weights import require_rank

ADAPTER = "default"


class Targets(Options):
    """A fused q, k, v layer is one layer, changed as a whole if any of the three is a target.

    fc1 takes the gate of a gated MLP along.
    """

    targets: LayerTargets = None


class PeftMethod(Method):
    """A method of a row of ``peft_rows.py``; those of a subclass differ in more than the row can say.

    Attributes:
        run: How a layer of peft is called.
    """

    row: ClassVar[PeftEntry]
    run: ClassVar[Run] = staticmethod(plain_run)

    Config: type[Targets] = Targets
    config: Any

    @classmethod
    def of_row(cls, row: PeftEntry) -> "type[PeftMethod]":
        """Return the class of a row, with its options."""
        known = cls.Config.model_fields
        fields: dict[str, Any] = {
            name: (option.kind or known[name].annotation, option.field) for name, option in row.options.items()
        }
        config = create_model("Config", __base__=cls.Config, **fields)
        return type(row.name, (cls,), {"__doc__": row.formula, "row": row, "Config": config})

    def peft_config(self, layers: Mapping[str, PeftLayer]) -> PeftConfig:
        """Return peft's configuration for target modules of these names."""
        row, options = self.row, self.config
        given = {option.peft: getattr(options, name) for name, option in row.options.items() if option.peft}
        rank = row.rank_option or "rank"  # what null as alpha stands for
        settings = {theirs: getattr(options, rank) if value is None else value for theirs, value in given.items()}
        kind = getattr(peft, row.config)
        return kind(target_modules=list(layers), **settings, **row.fixed, **row.settings(options, layers))

    def training_hooks(self, changes: list[nn.Module]) -> TrainingHooks:
        """Return what the method does in the course of training with peft's layers."""
        return NO_HOOKS

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        row = self.row
        layers = layers_of(anatomy, self.config.targets, row.default_targets)
        linears = shared_linears(model, layers)
        if rank := getattr(self.config, row.rank_option or "", None):
            for layer, linear in zip(layers, linears, strict=True):
                shape = (linear.out_features, linear.in_features)
                require_rank(rank, min(shape) if row.rank_within == "both" else shape[1], layer.path, shape)
        changes = self._wrap(linears, layers)
        name, common, moves_bias = f"remap_{row.name}", row.shared, row.moves_bias
        attachment = attach_changes(model, name, layers, changes, common=common, moves_bias=moves_bias, run=self.run)
        assert attachment.edits is not None
        trained = attachment.edits.parameters()
        exempt = [name for name, p in trained.items() if p.ndim <= 1 or set(name.split(".")) & set(row.exempt)]
        hooks = self.training_hooks(changes)
        return replace(attachment, no_decay=exempt, identity_at_init=row.exact_start, hooks=hooks)

    def _wrap(self, linears: Sequence[nn.Linear], layers: Sequence[Layer]) -> list[nn.Module]:
        """Return peft's layers around the shared ones."""
        names = [f"layer{index:04}" for index in range(len(layers))]
        holder = nn.ModuleDict(dict(zip(names, linears, strict=True)))
        sizes = [
            PeftLayer(at.words, linear.out_features, linear.in_features)
            for at, linear in zip(layers, linears, strict=True)
        ]
        # peft freezes what it wraps, which is the backbone's own tensors: Attached decides on those.
        before = {p: p.requires_grad for p in holder.parameters()}
        try:
            for parameter in before:
                parameter.requires_grad_(False)
            config = self.peft_config(dict(zip(names, sizes, strict=True)))
            # Random places are drawn on the CPU, also for a model that has shapes only.
            with warnings.catch_warnings(), torch.device("cpu"):
                warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")  # the row of oft says so
                get_peft_model(holder, config, adapter_name=ADAPTER)
        except ValueError as error:
            raise BackboneError(f"these options of {self.row.name} do not fit the layers", given=str(error)) from error
        finally:
            for parameter, required in before.items():
                parameter.requires_grad_(required)
        changes = [holder[name] for name in names]
        for layer, change in zip(layers, changes, strict=True):
            trained = [p for p in change.parameters() if p.requires_grad and p not in before]
            if not isinstance(change, BaseTunerLayer) or not trained:
                raise BackboneError(f"peft did not adapt {layer.path}", given=type(change).__name__)
            for name in self.row.kept:
                tensor = getattr(change, name)[ADAPTER]
                delattr(change, name)
                setattr(change, name, BufferDict({ADAPTER: tensor}, persistent=True))
        return changes


class Flattened(PeftMethod):
    """peft's layer takes three dimensions at most, or four for an image whose channels come first."""

    @staticmethod
    def run(change: nn.Module, x: Tensor, **bias: Tensor) -> Tensor:
        return change(x.flatten(1, 2), **bias).unflatten(1, x.shape[1:3]) if x.ndim == 4 else change(x, **bias)


# peft's layers are of many classes, of which only names are shared: Any.
class AddedDelta(PeftMethod):
    """W' x in one product; peft adds that of the change to that of W, which costs one more forward and one backward.

    Of loha and lokr, peft's own forward also draws random numbers in training, even without dropout.
    """

    @staticmethod
    def run(change: Any, x: Tensor, **bias: Tensor) -> Tensor:
        return _changed(change, x, change.get_delta_weight(ADAPTER), **bias)


def _changed(change: nn.Module, x: Tensor, delta_oi: Tensor, **bias: Tensor) -> Tensor:
    base = base_of(change)
    return base(x, weight=base.weight + delta_oi.to(base.weight.dtype), **bias)


def _random_mask(base: nn.Linear, r: int, **_: object) -> Tensor:
    """Draw as peft does, but on the CPU also where the weight has no values."""
    mask = torch.zeros(base.weight.numel())
    mask[torch.randperm(len(mask))[: r * sum(base.weight.shape)]] = 1.0
    return mask.view(base.weight.shape)


class SHiRA(PeftMethod):
    """peft's own forward is a sparse tensor that leaves out the layer's forward and cannot be compiled."""

    @staticmethod
    def run(change: Any, x: Tensor, **bias: Tensor) -> Tensor:
        base, values = base_of(change), change.shira_weight[ADAPTER]
        places = tuple(change.shira_indices[ADAPTER].long())
        return _changed(change, x, values.new_zeros(base.weight.shape).index_put(places, values), **bias)

    def peft_config(self, layers: Mapping[str, PeftLayer]) -> PeftConfig:
        config: Any = super().peft_config(layers)
        config.mask_fn = _random_mask
        return config


class HRA(PeftMethod):
    """peft's own forward reads the weight in a way that cannot be exported."""

    @staticmethod
    def run(change: Any, x: Tensor, **bias: Tensor) -> Tensor:
        base = base_of(change)
        return base(x, weight=base.weight @ change.get_delta_weight(ADAPTER), **bias)


class GLoRA(PeftMethod):
    """Weight and bias are changed together. peft takes nothing but ``nn.Linear`` itself."""

    @staticmethod
    def run(change: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the changed layer once: peft does it twice, and reads the bias past what is given."""
        base = base_of(change)
        weight_oi, bias = base.weight, base.bias if bias is None else bias
        a, b, c, d, e = (getattr(change, f"glora_{path}")[ADAPTER]() for path in "ABCDE")
        if bias is not None:
            bias = bias + bias * d + e + (weight_oi @ c).squeeze(-1)
        return base(x, weight=weight_oi + weight_oi * a + b, bias=bias)

    def _wrap(self, linears: Sequence[nn.Linear], layers: Sequence[Layer]) -> list[nn.Module]:
        plain = [nn.Linear.__new__(nn.Linear) for _ in linears]
        for stand_in, linear in zip(plain, linears, strict=True):
            stand_in.__dict__.update(linear.__dict__)
        changes = super()._wrap(plain, layers)
        for change, linear in zip(changes, linears, strict=True):
            change.base_layer = linear
        return changes
