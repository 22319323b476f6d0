"""What a tuning method is, and what it says about the model it was attached to.

A method is one class with a nested pydantic ``Config`` (its options with the paper's defaults). It edits the
model in place, keeps every frozen weight at its state-dict path, and never touches head, optimiser or recipe.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError, TrainingError
from remap.tuning.seam import Seam

# What the name of every inserted module begins with, so that methods can tell it from the backbone's own.
INSERTED = "remap_"

Kind = TypeVar("Kind", bound=nn.Module)


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

    def labeled(self, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``batches``, whose images must have labels.

        Args:
            what: That reads them, for the message.

        Raises:
            TrainingError: One has none, or there is no image.
        """
        found = False
        for images_BCHW, labels_B in self.batches():
            found = int(labels_B.min()) >= 0
            if not found:
                break
            yield images_BCHW, labels_B
        if not found:
            raise TrainingError(
                f"{what} reads training images with labels, and these have none",
                do="name labelled images (--data), or take another method or option",
            )


class Edits:
    """What a method did to one model, so that all of it can be taken back.

    Attributes:
        added: Dotted paths of the modules it inserted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.added: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def insert(self, path: str, module: Kind, like: Tensor | None = None) -> Kind:
        """Register ``module`` at a dotted path that must be free, in the mode (train or eval) of the model.

        Its last name begins with ``INSERTED``.

        Args:
            like: A tensor on the device and in the dtype that the module is converted to.

        Returns:
            The module.

        Raises:
            BackboneError: Something is there already, as when a method is attached a second time.
        """
        parent, _, name = path.rpartition(".")
        assert name.startswith(INSERTED), path
        if hasattr(self.model.get_submodule(parent), name):
            raise BackboneError(
                "the model already carries this tuning method", given=path, do="detach it, or build the model anew"
            )
        if like is not None:
            module = module.to(device=like.device, dtype=like.dtype)
        self.model.get_submodule(parent).add_module(name, module.train(self.model.training))
        self.added.append(path)
        return module

    def before(
        self, path: str, hook: Callable[..., Any], *, first: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Install a forward pre-hook, ``first`` in front of those that are there.

        Raises:
            BackboneError: The path is that of a module which this network lacks (``Anatomy.input_module``).
        """
        if not path:
            raise BackboneError(
                f"{type(self.model).__name__} has no single module that takes the image, where this method acts",
                do="take another method, such as lora, norm or partial",
            )
        module = self.model.get_submodule(path)
        self._handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=with_kwargs))
        return self._handles[-1]

    def after(self, path: str, hook: Callable[..., Any], *, first: bool = False) -> RemovableHandle:
        """Install a forward hook, ``first`` in front of those that are there."""
        self._handles.append(self.model.get_submodule(path).register_forward_hook(hook, prepend=first))
        return self._handles[-1]

    def undo_by(self, function: Callable[[], None]) -> None:
        """Let ``remove`` call a function, before hooks and modules go; the last one first."""
        self._undo.append(function)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the inserted modules by full name."""
        prefixes = tuple(f"{path}." for path in self.added)
        return {name: p for name, p in self.model.named_parameters() if prefixes and name.startswith(prefixes)}

    def remove(self) -> None:
        """Take all of it back."""
        for undo in reversed(self._undo):
            undo()
        for handle in self._handles:
            handle.remove()
        for path in self.added:
            parent, _, name = path.rpartition(".")
            delattr(self.model.get_submodule(parent), name)


class TrainingHooks:
    """What a method does in the course of training besides the forward pass. By default nothing.

    Attributes:
        wants_sample: Whether ``prepare`` must be called with training images before the first step.
        sample_images: How many of them there are at most.
        each_session: Whether it must be called in a run that extends another too (``remap extend``), with its images.
    """

    wants_sample: bool = False
    sample_images: int = 512
    each_session: bool = False

    def prepare(self, sample: Sample) -> None:
        """Look at training images before the first step (not again when a run is resumed).

        All that this decides must be in the trained parameters or the buffers, so that a task holds it.
        """

    def start_session(self) -> None:
        """Act in a run that extends another, once the tensors of that run are in place."""

    def finish(self, sample: Sample) -> None:
        """Look at all training images after the last step. All that this decides must be in a task, as in prepare."""

    def before_step(self, average: Callable[[list[Tensor]], None]) -> None:
        """Change the gradients of a step, which are those of the whole batch.

        Args:
            average: Sets tensors to their mean over all processes, in place; every process calls it alike.
        """

    def after_step(self, step: int, total: int) -> None:
        """Act after optimiser step ``step`` (from 0) of ``total``, while the gradients are still there.

        A step that was left out, as it was not finite, has none: every gradient is None.
        """

    def penalty(self) -> Tensor | None:
        """Return a term that is added to the loss, a float32 scalar."""
        return None

    def memory(self) -> dict[str, Tensor]:
        """Return what is remembered from step to step besides trained tensors, for checkpoints."""
        return {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Put ``memory`` back when a run is resumed."""


NO_HOOKS = TrainingHooks()


@dataclass(frozen=True)
class Fold:
    """How the tuned parameters are written into plain backbone weights.

    Attributes:
        write: Does it, without gradients.
        stage: In a combination low stages fold first, methods of one stage in their order. It goes from the inside of
            a layer outwards, as the forward does: 0 is the weights themselves, 1 a mix of a convolution's output
            channels, 2 scales of outputs, 3 a map between a norm's output and the layers that read it, 4 a scale of
            a complete branch.
        check: Raises a BackboneError if ``write`` cannot go through, before anything is changed.
    """

    write: Callable[[], None]
    stage: int = 0
    check: Callable[[], None] = lambda: None


# For methods that tune the backbone's own weights.
IN_PLACE = Fold(write=lambda: None)


@dataclass(frozen=True)
class Attachment:
    """One method on one model.

    Attributes:
        edits: What the method inserted and hooked; None where it changes nothing but what is trained.
        trainable: Full names (``model.named_parameters()``) of the parameters the method trains; the classifier
            head is not among them. None for all parameters of the inserted modules.
        no_decay: The subset of ``trainable`` that weight decay must leave alone (prompts, biases, norms, scales).
            None for those of at most one dimension.
        identity_at_init: Whether the model's output is unchanged right after attaching.
        extra_tokens: Prompt tokens that stand between the prefix and the patches inside the blocks; code that reads
            tokens or attention inside a block must cut them.
        tokens_from: The first block that has them; those behind have them too.
        tuned_modules: Paths of backbone modules whose dropout, drop-path and batch statistics are active in training
            ("" is the complete model); all others stay in eval.
        seam: Where the frozen part ends, for methods whose frozen part does not depend on what they train.
        fold: How the method becomes part of the backbone's weights; None where it cannot.
        hooks: What it does in the course of training.
        trains_head: Whether the classifier trains. Where it does not, the method writes it, and a task holds it.
    """

    edits: Edits | None = None
    _: KW_ONLY
    trainable: Collection[str] | None = None
    no_decay: Collection[str] | None = None
    identity_at_init: bool = True
    extra_tokens: int = 0
    tokens_from: int = 0
    tuned_modules: Collection[str] = ()
    seam: Seam | None = None
    fold: Fold | None = None
    hooks: TrainingHooks = NO_HOOKS
    trains_head: bool = True


class Method(ABC):
    """A tuning method with its options. Subclasses nest ``Config`` and implement ``attach``."""

    Config: type[Options] = Options
    config: Options

    def __init__(self, config: Options | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @abstractmethod
    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        """Edit ``model`` in place and say what is trained; ``attach_method`` freezes the rest."""


def names_where(model: nn.Module, anatomy: Anatomy, keep: Callable[[str], bool]) -> list[str]:
    """Return the names of the backbone's own parameters for which ``keep`` holds.

    Classifier and inserted modules are excluded.
    """
    names = (name for name, _ in model.named_parameters())
    return [name for name in names if not anatomy.is_head(name) and not is_inserted(name) and keep(name)]


def is_inserted(name: str) -> bool:
    """Return whether a full name belongs to a module that a tuning method inserted."""
    return any(part.startswith(INSERTED) for part in name.split("."))


def vectors(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of biases, scales and other vectors, which weight decay leaves alone."""
    return [name for name, p in parameters.items() if p.ndim <= 1]
