"""A model with its tuning methods: what is trained and saved, and how they come off again."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError, RunError
from remap.tuning.base import Attachment, Sample, TrainingHooks, vectors
from remap.tuning.dropout import SampleDropout


class Attached:
    """One or several methods on one model; what one of them needs, all of them together need.

    Attributes:
        methods: What each method said, by name.
        trainable, no_decay, identity_at_init, extra_tokens, tokens_from, tuned_modules, added, seam, trains_head: As in
            ``Attachment``. A combination has no seam.
        buffers: Full names of the buffers that training changes (running statistics) or that a method inserted.
        mergeable: Whether ``merge`` can fold the methods into plain backbone weights.
        wants_sample: Whether ``prepare`` must be called before the first step.
        sample_images: How many images it is shown at most.
        each_session: Whether it must be called in a run that extends another too.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, methods: Mapping[str, Attachment]) -> None:
        """Freeze the model except what the methods train."""
        self.model, self.anatomy, self.methods = model, anatomy, dict(methods)
        members = list(self.methods.values())
        parameters = dict(model.named_parameters())
        trained = [_trained(member, parameters) for member in members]
        self.trainable = _each_once(names for names, _ in trained)
        self.no_decay = _each_once(exempt for _, exempt in trained)
        self.identity_at_init = all(member.identity_at_init for member in members)
        self.extra_tokens = sum(member.extra_tokens for member in members)
        self.tokens_from = max(member.tokens_from for member in members)
        self.tuned_modules = _each_once(member.tuned_modules for member in members)
        self.added = _each_once(member.edits.added for member in members if member.edits is not None)
        self.seam = members[0].seam if len(members) == 1 else None
        self.trains_head = all(member.trains_head for member in members)
        self.mergeable = all(member.fold is not None for member in members)
        self.wants_sample = any(member.hooks.wants_sample for member in members)
        self.sample_images = max(member.hooks.sample_images for member in members)
        self.each_session = any(member.hooks.each_session for member in members)
        tuned = self.added_prefixes + tuple(f"{path}." if path else "" for path in self.tuned_modules)
        persistent = set(model.state_dict())
        self.buffers = tuple(
            name
            for name, _ in model.named_buffers()
            if tuned and name.startswith(tuned) and name in persistent and not anatomy.is_head(name)
        )
        self._required_grad = {name: p.requires_grad for name, p in parameters.items()}
        chosen = set(self.trainable)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        self._keyed = [module for module in model.modules() if isinstance(module, SampleDropout)]
        if len(members) > 1:  # each numbers its own sites from 0: two of them would drop the same elements together
            for site, module in enumerate(self._keyed):
                module.renumber(site)
        # Tuned backbone tensors must come back bit for bit on detach; inserted modules just go.
        self._original: dict[str, Tensor] | None = {
            name: tensor.detach().clone()
            for name, tensor in self._tensors().items()
            if not (self.added and name.startswith(self.added_prefixes))
        }

    @property
    def added_prefixes(self) -> tuple[str, ...]:
        """What the full names of inserted parameters start with."""
        return tuple(f"{path}." for path in self.added)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tuned parameters and buffers themselves, by full name."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: tensors[name] for name in (*self.trainable, *self.buffers)}

    def state(self) -> dict[str, Tensor]:
        """Return the tuned tensors (parameters and buffers) by full name, detached, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the tuned tensors.

        Raises:
            RunError: Names or shapes differ from what the methods train.
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

    def set_sample_keys(self, keys_B: Tensor | None) -> None:
        """Set for the methods' dropout which images the next forward pass holds (see ``SampleDropout``)."""
        for module in self._keyed:
            module.keys_B = keys_B

    def prepare(self, sample: Sample) -> None:
        """Let the methods that want to look at training images do so (see ``TrainingHooks``)."""
        for member in self.methods.values():
            if member.hooks.wants_sample:
                member.hooks.prepare(sample)

    def start_session(self) -> None:
        """Let the methods act once the tensors of the run that is extended are in place."""
        for member in self.methods.values():
            member.hooks.start_session()

    @property
    def finishing(self) -> list[TrainingHooks]:
        """The hooks of methods that look at all training images after the last step."""
        hooks = [member.hooks for member in self.methods.values()]
        return [one for one in hooks if type(one).finish is not TrainingHooks.finish]

    @property
    def pruning(self) -> list[str]:
        """The methods that act between steps: they choose in training what stays."""
        hooks = {name: member.hooks for name, member in self.methods.items()}
        return [name for name, one in hooks.items() if type(one).after_step is not TrainingHooks.after_step]

    def before_step(self, average: Callable[[list[Tensor]], None]) -> None:
        """Let the methods change the gradients of the whole batch (see ``TrainingHooks``)."""
        for member in self.methods.values():
            member.hooks.before_step(average)

    def after_step(self, step: int, total: int) -> None:
        """Let the methods act after optimiser step ``step`` of ``total``."""
        for member in self.methods.values():
            member.hooks.after_step(step, total)

    def penalty(self) -> Tensor | None:
        """Return the sum of the terms that the methods add to the loss, None where there are none."""
        penalties = [value for member in self.methods.values() if (value := member.hooks.penalty()) is not None]
        if len(penalties) > 1:
            return torch.stack(penalties).sum()
        return penalties[0] if penalties else None

    def memory(self) -> dict[str, Tensor]:
        """Return what the methods remember from step to step besides ``state``, for checkpoints."""
        return {
            f"{prefix}{key}": value
            for prefix, member in self._by_prefix()
            for key, value in member.hooks.memory().items()
        }

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Put ``memory`` back when a run is resumed."""
        for prefix, member in self._by_prefix():
            remembered = {key.removeprefix(prefix): value for key, value in memory.items() if key.startswith(prefix)}
            member.hooks.recall(remembered)

    def _by_prefix(self) -> list[tuple[str, Attachment]]:
        """Return the methods with what the keys of their memory start with in a combination."""
        members = list(self.methods.values())
        return [(f"{index}." if len(members) > 1 else "", member) for index, member in enumerate(members)]

    def merge(self) -> nn.Module:
        """Fold the tuned parameters into plain backbone weights and remove the methods' modules.

        Raises:
            BackboneError: A method cannot be folded, or all are off the model already.
        """
        self._require_attached()
        folds = {name: member.fold for name, member in self.methods.items()}
        if stay := [name for name, fold in folds.items() if fold is None]:
            raise BackboneError(
                f"{' and '.join(stay)} cannot be folded into the backbone's weights",
                given="+".join(self.methods),
                do="keep the task files: they reload the tuned model exactly",
            )
        ordered = sorted((fold for fold in folds.values() if fold is not None), key=lambda fold: fold.stage)
        with torch.no_grad():
            for fold in ordered:
                fold.check()
            for fold in ordered:
                fold.write()
        return self._remove()

    def forget_original(self) -> None:
        """Drop the copy of the tuned backbone weights that only ``detach`` reads, as large as what is tuned."""
        if self._original:
            self._original = None

    def detach(self) -> nn.Module:
        """Give the backbone back bit for bit as it was before attaching.

        Raises:
            BackboneError: The original weights were dropped, or the methods are off the model already.
        """
        self._require_attached()
        if self._original is None:
            raise BackboneError("the backbone's original weights were dropped, so it cannot be given back")
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in self._original.items():
                tensors[name].copy_(value)
        return self._remove()

    def _require_attached(self) -> None:
        if not self.methods:
            raise BackboneError("the methods are off this model already", do="attach one again: remap.attach")

    def _remove(self) -> nn.Module:
        """Take hooks and inserted modules off the model."""
        for member in reversed(self.methods.values()):
            if member.edits is not None:
                member.edits.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, True))
        self.methods, self.added = {}, ()
        return self.model


def _trained(member: Attachment, parameters: Mapping[str, nn.Parameter]) -> tuple[Iterable[str], Iterable[str]]:
    """Return the names of what a method trains, and of what weight decay must leave alone."""
    inserted = member.edits.parameters() if member.edits is not None else {}
    names = list(inserted if member.trainable is None else member.trainable)
    unknown = [name for name in names if name not in parameters]
    assert not unknown, f"a method named parameters that do not exist: {unknown}"
    if member.no_decay is not None:
        return names, member.no_decay
    return names, vectors({name: parameters[name] for name in names})


def _each_once(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
