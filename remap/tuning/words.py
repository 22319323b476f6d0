"""Classifiers that a text tower makes: what methods on vision-language models have in common.

Letters: C classes, L positions of a text, M context vectors, D width of the text tower, E dimensions that images and
texts share.
"""

from abc import abstractmethod
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.errors import BackboneError
from remap.language.pair import Language, require_language
from remap.language.text_tower import TextTower
from remap.tuning.base import NO_HOOKS, Attachment, Edits, Fold, TrainingHooks, vectors
from remap.tuning.seam import feature_seam
from remap.tuning.weights import recompute_at, registered

PATH = "remap_words"


class WordHead(nn.Module):
    """Writes the classifier of a vision-language model: its row c is scale * t_c, t_c the unit feature of class c.

    In training every read of the classifier's weight computes it, with a graph. When training ends it is written into
    the classifier, which is an ordinary linear layer then: prediction, tasks, merging and export need no text tower.

    Attributes:
        unit_CE: The unit features of the last forward pass of training, for penalties on them.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, method: str) -> None:
        super().__init__()
        head = classifier_of(model, anatomy, method)
        # In a tuple: neither the text tower nor the classifier is a module of this one.
        self._outside = (require_language(model, method), head)
        self.unit_CE: Tensor | None = None
        self.training = False  # nothing is written before it was trained

    @property
    def language(self) -> Language:
        return self._outside[0]

    @property
    def head(self) -> nn.Linear:
        return self._outside[1]

    @abstractmethod
    def texts(self) -> Tensor:
        """Return features (C, E) of the classes, of any length."""

    def forward(self) -> Tensor:
        """Return the unit features (C, E) of the classes, float32 or wider."""
        return F.normalize(at_least_float32(self.texts()), dim=-1)

    def read(self, stored_CE: Tensor) -> Tensor:
        """Return the classifier's weight (C, E) instead of the one that it stores."""
        if not self.learns:
            return stored_CE
        self.unit_CE = self()
        return (self.language.scale * self.unit_CE).to(stored_CE.dtype)

    @property
    def learns(self) -> bool:
        """Whether the classifier follows what is trained; a loaded task has it, and not the names of its classes."""
        return self.training and bool(self.language.names)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and write the classifier where training ends."""
        if self.learns and not mode:
            self.write()
        return super().train(mode)

    @torch.no_grad()
    def write(self) -> None:
        """Write the classifier."""
        self.unit_CE = None
        stored_CE = registered(self.head, "weight")
        stored_CE.copy_(self.language.scale * self())

    def unit_now(self) -> Tensor:
        """Return the unit features (C, E) of the forward pass that just was."""
        return self() if self.unit_CE is None else self.unit_CE

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "unit_CE": None}


def insert_words(edits: Edits, anatomy: Anatomy, words: WordHead) -> None:
    """Insert the module, and let it make the classifier's weight; where the classes are known, write it once."""
    edits.insert(PATH, words, words.head.weight)
    recompute_at(edits, f"{anatomy.classifier_heads[0]}.weight", partial(_read, words))
    if words.language.names:
        words.write()


def _read(words: WordHead, stored_CE: Tensor) -> Tensor:
    return words.read(stored_CE)


def _write(words: WordHead) -> None:
    words.eval()


def attach_words(
    model: nn.Module, anatomy: Anatomy, words: WordHead, hooks: TrainingHooks = NO_HOOKS, *, edits: Edits | None = None
) -> Attachment:
    """Let a module make the classifier of a frozen image tower."""
    edits = edits or Edits(model)
    insert_words(edits, anatomy, words)
    # Where it was not trained it is written already.
    return in_place_of_head(edits, seam=feature_seam(model, anatomy), fold=Fold(partial(_write, words)), hooks=hooks)


def in_place_of_head(edits: Edits, **more: Any) -> Attachment:
    """Return what is said of a method that stands in for the classifier, and what ``more`` there is to say."""
    return Attachment(edits, no_decay=without_decay(edits), identity_at_init=False, trains_head=False, **more)


def without_decay(edits: Edits) -> list[str]:
    """Return the inserted vectors, context and prompts: weight decay leaves them alone."""
    parameters = edits.parameters()
    embeddings = [name for name in parameters if name.rpartition(".")[2] in ("context", "deep", "prompts", "space")]
    return [*embeddings, *vectors(parameters)]


def classifier_of(model: nn.Module, anatomy: Anatomy, method: str) -> nn.Linear:
    """Return the classifier of a vision-language model.

    Raises:
        BackboneError: It is another model, or has no classifier.
    """
    require_language(model, method)
    head = module_at(model, anatomy.classifier_heads[0])
    if not isinstance(head, nn.Linear):
        raise BackboneError(f"{method} writes the classifier, and this model has none", do="name data with classes")
    return head


def zero_shot(language: Language, like: Tensor) -> Tensor:
    """Return the unit features (C, E) of the frozen model's own texts, on the device and in the dtype of a tensor."""
    return language.features_CE.to(like)


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tower_for(language: Language, like: Tensor) -> TextTower:
    """Return the text tower on the device and in the dtype of a tensor."""
    weight = language.tower.positions
    if weight.device != like.device or weight.dtype != like.dtype:
        language.tower.to(like)
    return language.tower
