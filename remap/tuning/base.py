"""The Method protocol: how a tuning method is attached to a backbone, and what that gives back.

A method is one class with a nested pydantic ``Config`` (its options with the paper's defaults). It edits the
model in place, keeps every frozen weight at its state-dict path, and never touches head, optimiser or recipe.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError, RunError
from remap.tuning.dropout import SampleDropout
from remap.tuning.seam import Seam

# What the name of every inserted module begins with, so that methods can tell it from the backbone's own.
INSERTED = "remap_"


class Options(BaseModel):
    """Base of every method's and loss's options: frozen, and an unknown option is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Sample:
    """Training images that a method may look at before the first step.

    Attributes:
        batches: Yields (pixels (B, 3, S, S) as the backbone takes them, labels (B,)) over a fixed random subset of the
            training images, on the model's device; every call gives the same ones.
        num_classes: Number of classes.
    """

    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    num_classes: int


class Attached:
    """A method attached to one model.

    Methods with a life of their own during training subclass it and override ``prepare``, ``after_step``,
    ``penalty``, ``memory`` and ``recall``; methods that can be folded override ``_fold``.

    Attributes:
        trainable: Full names (``model.named_parameters()``) of the parameters the method trains; the classifier
            head is not among them.
        buffers: Full names of the buffers that training changes (running statistics) or that the method owns.
        no_decay: The subset of ``trainable`` that weight decay must leave alone (prompts, biases, norms, scales).
        identity_at_init: Whether the model's output is unchanged right after attaching.
        extra_tokens: Prompt tokens that stand between the prefix and the patches inside the blocks; whoever reads
            tokens or attention inside a block must cut them.
        tokens_from: The first block that has them; those behind have them too.
        mergeable: Whether ``merge`` can fold the method into plain backbone weights.
        tuned_modules: Paths of backbone modules whose dropout, drop-path and batch statistics are active in training
            ("" is the whole model); all others stay in eval.
        added: Dotted paths of the modules the method inserted.
        seam: Where the frozen part ends, for methods whose frozen part does not depend on what they train.
        wants_sample: Whether ``prepare`` must be called with training images before the first step.
        fold_stage: In a combination ``merge`` folds low stages first, parts of one stage in their order. It goes from
            the inside of a layer outwards, as the forward does: 0 is the weights themselves, 1 a mix of a
            convolution's output channels, 2 scales of outputs, 3 a map between a norm's output and the layers that
            read it, 4 a scale of a whole branch.
    """

    wants_sample: bool = False
    fold_stage: int = 0

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        trainable: Iterable[str],
        no_decay: Iterable[str] = (),
        identity_at_init: bool = True,
        extra_tokens: int = 0,
        tokens_from: int = 0,
        mergeable: bool = False,
        tuned_modules: Iterable[str] = (),
        added: Iterable[str] = (),
        handles: Iterable[RemovableHandle] = (),
        undo: Iterable[Callable[[], None]] = (),
        seam: Seam | None = None,
    ) -> None:
        """Freeze the whole model except ``trainable``.

        Args:
            added: Dotted paths of modules the method inserted (``insert_module``); ``detach`` removes them.
            handles: Hooks the method installed; ``detach`` removes them.
            undo: Called by ``detach`` and ``merge``, last one first, before hooks and modules go.
        """
        self.model, self.anatomy = model, anatomy
        self.trainable, self.no_decay = tuple(trainable), tuple(no_decay)
        self.identity_at_init, self.mergeable = identity_at_init, mergeable
        self.extra_tokens, self.tokens_from = extra_tokens, tokens_from
        self.tuned_modules, self.seam = tuple(tuned_modules), seam
        self.added, self._handles, self._undo = tuple(added), tuple(handles), tuple(undo)
        parameters = dict(model.named_parameters())
        unknown = [name for name in self.trainable if name not in parameters]
        assert not unknown, f"a method named parameters that do not exist: {unknown}"
        inside = self.added_prefixes + tuple(f"{path}." if path else "" for path in self.tuned_modules)
        persistent = set(model.state_dict())
        self.buffers = tuple(
            name
            for name, _ in model.named_buffers()
            if inside and name.startswith(inside) and name in persistent and not anatomy.is_head(name)
        )
        self._required_grad = {name: p.requires_grad for name, p in parameters.items()}
        chosen = set(self.trainable)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        self._keyed = [module for module in model.modules() if isinstance(module, SampleDropout)]
        self._forgotten = False
        self._original = self._copy_of_original()

    @property
    def added_prefixes(self) -> tuple[str, ...]:
        """What the full names of inserted parameters start with."""
        return tuple(f"{path}." for path in self.added)

    def _tensors(self) -> dict[str, Tensor]:
        """The tuned parameters and buffers themselves, by full name."""
        everything = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: everything[name] for name in (*self.trainable, *self.buffers)}

    def _copy_of_original(self) -> dict[str, Tensor]:
        """Tuned backbone tensors, which must come back bit for bit on detach; inserted modules just go."""
        return {
            name: tensor.detach().clone()
            for name, tensor in self._tensors().items()
            if not (self.added and name.startswith(self.added_prefixes))
        }

    def state(self) -> dict[str, Tensor]:
        """The tuned tensors (parameters and buffers) by full name, detached, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the tuned tensors.

        Raises:
            RunError: Names or shapes differ from what this method trains.
        """
        tensors = self._tensors()
        problems = [f"missing {name}" for name in tensors if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in tensors]
        problems += [
            f"{name} is {tuple(state[name].shape)}, wanted {tuple(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if problems:
            raise RunError("the tuned parameters do not fit this method and backbone", given="; ".join(problems[:5]))
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])

    def train(self) -> None:
        """Put the model in the mode of a training step: frozen parts in eval, tuned parts in train."""
        self.model.train(False)
        for path in (*self.tuned_modules, *self.added):
            self.model.get_submodule(path).train()

    def prepare(self, sample: Sample) -> None:
        """Look at training images before the first step (not again when a run is resumed).

        Whatever this decides must be in the trained parameters or the buffers, so that ``state`` holds it.
        """

    def after_step(self, step: int, total: int) -> None:
        """Called after optimiser step ``step`` (from 0) of ``total``, while the gradients are still there."""

    def penalty(self) -> Tensor | None:
        """A term the method adds to the loss, a float32 scalar."""
        return None

    def memory(self) -> dict[str, Tensor]:
        """What ``after_step`` remembers from step to step besides ``state``, for checkpoints."""
        return {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Put ``memory`` back when a run is resumed."""

    def set_sample_keys(self, keys_B: Tensor | None) -> None:
        """Tell the method's dropout which images the next forward pass holds (see ``SampleDropout``)."""
        for module in self._keyed:
            module.keys_B = keys_B

    def merge(self) -> nn.Module:
        """Fold the tuned parameters into plain backbone weights and take the method's modules off.

        Raises:
            BackboneError: The method cannot be folded.
        """
        self._require_mergeable()
        with torch.no_grad():
            self._check_fold()
            self._fold()
        self._take_off()
        return self.model

    def _require_mergeable(self) -> None:
        if not self.mergeable:
            raise BackboneError(
                "this method cannot be folded into the backbone's weights",
                given=", ".join(self.added[:3]) or "no inserted modules",
                do="keep the task files: they reload the tuned model exactly",
            )

    def forget_original(self) -> None:
        """Drop the copy of the tuned backbone weights that only ``detach`` reads, as large as what is tuned."""
        self._forgotten = bool(self._original)
        self._original = {}

    def detach(self) -> nn.Module:
        """Give the backbone back bit for bit as it was before attaching.

        Raises:
            BackboneError: The original weights were forgotten.
        """
        self._require_original()
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in self._original.items():
                tensors[name].copy_(value)
        self._take_off()
        return self.model

    def _require_original(self) -> None:
        if self._forgotten:
            raise BackboneError("the backbone's original weights were dropped, so it cannot be given back")

    def _check_fold(self) -> None:
        """Raise a BackboneError if ``_fold`` cannot go through, before anything is changed."""

    def _fold(self) -> None:
        """Write the tuned parameters into the backbone; nothing to do for methods that tune it in place."""

    def _take_off(self) -> None:
        for undo in reversed(self._undo):
            undo()
        for handle in self._handles:
            handle.remove()
        for path in self.added:
            parent, _, name = path.rpartition(".")
            delattr(self.model.get_submodule(parent), name)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, True))
        self.added = self._handles = self._undo = ()


class Method(ABC):
    """A tuning method with its options. Subclasses nest ``Config`` and implement ``attach``."""

    Config: type[Options] = Options

    def __init__(self, config: Options | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @abstractmethod
    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        """Edit ``model`` in place and say what is trained."""


def names_where(model: nn.Module, anatomy: Anatomy, keep: Callable[[str, nn.Parameter], bool]) -> list[str]:
    """Names of the backbone's own parameters (classifier and inserted modules excluded) for which ``keep`` holds."""
    return [
        name
        for name, p in model.named_parameters()
        if not anatomy.is_head(name) and not is_inserted(name) and keep(name, p)
    ]


def is_inserted(name: str) -> bool:
    """Whether a full name belongs to a module that a tuning method inserted."""
    return any(part.startswith(INSERTED) for part in name.split("."))


def insert_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Register ``module`` at a dotted path that must be free, in the mode (train or eval) of the model.

    Its last name begins with ``INSERTED``.

    Raises:
        BackboneError: Something is there already, as when a method is attached a second time.
    """
    parent, _, name = path.rpartition(".")
    assert name.startswith(INSERTED), path
    if hasattr(model.get_submodule(parent), name):
        raise BackboneError(
            "the model already carries this tuning method", given=path, do="detach it, or build the model anew"
        )
    model.get_submodule(parent).add_module(name, module.train(model.training))


def inserted_parameters(model: nn.Module, added: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters of inserted modules by full name."""
    prefixes = tuple(f"{path}." for path in added)
    return {name: p for name, p in model.named_parameters() if prefixes and name.startswith(prefixes)}


def vectors(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of biases, scales and other vectors, which weight decay leaves alone."""
    return [name for name, p in parameters.items() if p.ndim <= 1]


def attached_modules(
    model: nn.Module, anatomy: Anatomy, added: Iterable[str], handles: Iterable[RemovableHandle], **facts: Any
) -> Attached:
    """A method that is nothing but inserted modules and their hooks, and trains all their parameters.

    Args:
        facts: Further arguments of ``Attached``; by default weight decay leaves vectors alone.
    """
    added = tuple(added)
    parameters = inserted_parameters(model, added)
    facts = {"no_decay": vectors(parameters), **facts}
    return Attached(model, anatomy, trainable=parameters, added=added, handles=handles, **facts)
