"""The weighted sum of loss terms. Weights live here only; a term never multiplies by its own."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, cast

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.remapping.labels import Labels
from remap.remapping.signals import Needs, Signals
from remap.tuning.base import Options


@dataclass(frozen=True)
class Pair:
    """The two sides a term may ask about when it is built. ``teacher`` is None when there is none."""

    student: Anatomy
    teacher: Anatomy | None
    num_classes: int

    def known_teacher(self, term: str) -> Anatomy:
        """Return the teacher's anatomy.

        Raises:
            BackboneError: There is no teacher.
        """
        if self.teacher is None:
            raise BackboneError(f"the loss '{term}' needs a teacher", do="name one, or leave this loss out")
        return self.teacher


class LossTerm(nn.Module):
    """One term of the objective.

    A term declares what it needs from both networks, reduces the teacher's signals to compact items (which are kept
    when the view of an image never changes), and returns a scalar from the student's signals and those items.
    Projectors are ordinary parameters of the term: trained, kept for resuming, dropped from the task.

    Attributes:
        classifier: Which classifier it trains where a student has one for the labels and one for the teacher
            (distilled DeiT); None where it trains none.
        blocks: Which student block learns from which teacher block, as (student, teacher) counted from 0; the number
            of blocks stands for the tokens behind the final norm. Empty for terms that look into no block.
    """

    Config: type[Options] = Options
    uses_teacher: bool = True
    classifier: Literal["labels", "teacher"] | None = None
    blocks: tuple[tuple[int, int], ...] = ()

    def __init__(self, pair: Pair, config: Options) -> None:
        super().__init__()
        self.pair, self.config = pair, config

    def student_needs(self) -> Needs:
        return Needs()

    def teacher_needs(self) -> Needs:
        return Needs()

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        """Return what this term reads of the teacher, one row an image (first dimension B), detached.

        An item's name says all about it besides the teacher: terms whose items have the same name share one, and it
        is kept on disk under that name. ``remap.remapping.targets`` has the names.
        """
        return {}

    @abstractmethod
    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Return the unweighted loss, a float32 scalar, mean over the batch."""


class Objective(nn.Module):
    """Sum of ``weight * term`` over named terms.

    Args:
        teacher_of: Which teacher each term listens to, by its number; 0 for those left out.
    """

    def __init__(
        self, terms: Mapping[str, LossTerm], weights: Mapping[str, float], teacher_of: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.teacher_of = {name: (teacher_of or {}).get(name, 0) for name in terms}
        trained = {term.classifier for name, term in terms.items() if self.weights[name]}
        self._both_classifiers = {"labels", "teacher"} <= trained

    @property
    def uses_teacher(self) -> bool:
        return any(term.uses_teacher for term in self._named_terms().values())

    def reads_teacher(self, teacher: int) -> bool:
        """Return whether any term uses this teacher."""
        return bool(self._terms_of(teacher))

    def student_needs(self) -> Needs:
        return _union([term.student_needs() for term in self._named_terms().values()])

    def teacher_needs(self, teacher: int = 0) -> Needs:
        return _union([term.teacher_needs() for term in self._terms_of(teacher)])

    @torch.no_grad()
    def targets(self, signals: Signals, teacher: int = 0) -> dict[str, Tensor]:
        """Return the items of one teacher that its terms want, by item name, one row an image."""
        found: dict[str, Tensor] = {}
        for term in self._terms_of(teacher):
            # ``float()`` returns a float32 tensor itself, graph and all: detach what a term returns.
            found |= {key: value.detach() for key, value in term.target(signals).items() if key not in found}
        return found

    def forward(
        self, student: Signals, targets: Sequence[Mapping[str, Tensor]], labels: Labels
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and each term's unweighted value (detached).

        Without a loss for each of two classifiers, losses read their mean, which is the student's answer: else one of
        them would stay as it was drawn.

        Args:
            targets: The items of each teacher.
        """
        if not self._both_classifiers:
            student = replace(student, head_logits=())
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=labels.classes_B.device)
        for name, term in self._named_terms().items():
            value = term(student, targets[self.teacher_of[name]] if term.uses_teacher else {}, labels)
            parts[name] = value.detach()
            total = total + self.weights[name] * value
        return total, parts

    def _named_terms(self) -> dict[str, LossTerm]:
        return {name: cast(LossTerm, term) for name, term in self.terms.items()}

    def _terms_of(self, teacher: int) -> list[LossTerm]:
        named = self._named_terms()
        return [term for name, term in named.items() if term.uses_teacher and self.teacher_of[name] == teacher]


def _union(needs: Sequence[Needs]) -> Needs:
    return reduce(Needs.__or__, needs, Needs())
