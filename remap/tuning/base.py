"""The Method protocol: how a tuning method is attached to a backbone, and what that gives back.

A method is one class with a nested pydantic ``Config`` (its options with the paper's defaults). It edits the
model in place, keeps every frozen weight at its state-dict path, and never touches head, optimiser or recipe.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError, RunError
from remap.tuning.dropout import SampleDropout


class Options(BaseModel):
    """Base of every method's and loss's options: frozen, and an unknown option is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Attached:
    """A method attached to one model.

    Attributes:
        trainable: Full names (``model.named_parameters()``) of the parameters the method trains; the classifier
            head is not among them.
        no_decay: The subset of ``trainable`` that weight decay must leave alone (prompts, biases, norms, scales).
        identity_at_init: Whether the model's output is unchanged right after attaching.
        extra_tokens: Prompt tokens that stand between the prefix and the patches inside the blocks; whoever reads
            tokens or attention inside a block must cut them.
        mergeable: Whether ``merge`` can fold the method into plain backbone weights.
        trains_backbone: Whether backbone layers themselves are tuned, so that their dropout and drop-path are active.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        trainable: Iterable[str],
        no_decay: Iterable[str] = (),
        identity_at_init: bool = True,
        extra_tokens: int = 0,
        mergeable: bool = False,
        trains_backbone: bool = False,
        added: Iterable[str] = (),
        handles: Iterable[RemovableHandle] = (),
    ) -> None:
        """Freeze the whole model except ``trainable``.

        Args:
            added: Dotted paths of modules the method inserted; ``detach`` removes them.
            handles: Hooks the method installed; ``detach`` removes them.
        """
        self.model, self.anatomy = model, anatomy
        self.trainable, self.no_decay = tuple(trainable), tuple(no_decay)
        self.identity_at_init, self.extra_tokens, self.mergeable = identity_at_init, extra_tokens, mergeable
        self.trains_backbone = trains_backbone
        self._added, self._handles = tuple(added), tuple(handles)
        parameters = dict(model.named_parameters())
        unknown = [name for name in self.trainable if name not in parameters]
        assert not unknown, f"a method named parameters that do not exist: {unknown}"
        self._required_grad = {name: p.requires_grad for name, p in parameters.items()}
        chosen = set(self.trainable)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        self._keyed = [module for module in model.modules() if isinstance(module, SampleDropout)]
        self._forgotten = False
        # Tuned backbone weights must come back bit for bit on detach; inserted modules just go.
        self._original = {
            name: parameters[name].detach().clone()
            for name in self.trainable
            if not name.startswith(self.added_prefixes)
        }

    @property
    def added_prefixes(self) -> tuple[str, ...]:
        """What the full names of inserted parameters start with."""
        return tuple(f"{path}." for path in self._added)

    def state(self) -> dict[str, Tensor]:
        """The tuned tensors by full parameter name, detached, on the CPU."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().cpu().clone() for name in self.trainable}

    def load(self, state: dict[str, Tensor]) -> None:
        """Set the tuned tensors.

        Raises:
            RunError: Names or shapes differ from what this method trains.
        """
        parameters = dict(self.model.named_parameters())
        problems = [f"missing {name}" for name in self.trainable if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in set(self.trainable)]
        problems += [
            f"{name} is {tuple(state[name].shape)}, wanted {tuple(parameters[name].shape)}"
            for name in self.trainable
            if name in state and state[name].shape != parameters[name].shape
        ]
        if problems:
            raise RunError("the tuned parameters do not fit this method and backbone", given="; ".join(problems[:5]))
        with torch.no_grad():
            for name in self.trainable:
                parameters[name].copy_(state[name])

    def train(self) -> None:
        """Put the model in the mode of a training step: frozen parts in eval, tuned parts in train."""
        self.model.train(self.trains_backbone)
        for path in self._added:
            self.model.get_submodule(path).train()

    def set_sample_keys(self, keys_B: Tensor | None) -> None:
        """Tell the method's dropout which images the next forward pass holds (see ``SampleDropout``)."""
        for module in self._keyed:
            module.keys_B = keys_B

    def merge(self) -> nn.Module:
        """Fold the tuned parameters into plain backbone weights and take the method's modules off.

        Raises:
            BackboneError: The method cannot be folded.
        """
        if not self.mergeable:
            raise BackboneError(
                "this method cannot be folded into the backbone's weights",
                given=", ".join(self._added) or "no inserted modules",
                do="keep the task files: they reload the tuned model exactly",
            )
        self._fold()
        self._take_off()
        return self.model

    def forget_original(self) -> None:
        """Drop the copy of the tuned backbone weights that only ``detach`` reads, as large as what is tuned."""
        self._forgotten = bool(self._original)
        self._original = {}

    def detach(self) -> nn.Module:
        """Give the backbone back bit for bit as it was before attaching.

        Raises:
            BackboneError: The original weights were forgotten.
        """
        if self._forgotten:
            raise BackboneError("the backbone's original weights were dropped, so it cannot be given back")
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self._original.items():
                parameters[name].copy_(value)
        self._take_off()
        return self.model

    def _fold(self) -> None:
        """Write the tuned parameters into the backbone; nothing to do for methods that tune it in place."""

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        for path in self._added:
            parent, _, name = path.rpartition(".")
            delattr(self.model.get_submodule(parent), name)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        self._added = self._handles = ()


class Method(ABC):
    """A tuning method with its options. Subclasses nest ``Config`` and implement ``attach``."""

    Config: type[Options] = Options

    def __init__(self, config: Options | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @abstractmethod
    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        """Edit ``model`` in place and say what is trained."""


def names_where(model: nn.Module, anatomy: Anatomy, keep: Callable[[str, nn.Parameter], bool]) -> list[str]:
    """Names of backbone parameters (classifier excluded) for which ``keep(name, parameter)`` holds."""
    return [name for name, p in model.named_parameters() if not anatomy.is_head(name) and keep(name, p)]


def insert_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Register ``module`` at a dotted path that must be free, in the mode (train or eval) of the model.

    Raises:
        BackboneError: Something is there already, as when a method is attached a second time.
    """
    parent, _, name = path.rpartition(".")
    if hasattr(model.get_submodule(parent), name):
        raise BackboneError(
            "the model already carries a tuning method", given=path, do="detach it, or build the model anew"
        )
    model.get_submodule(parent).add_module(name, module.train(model.training))
