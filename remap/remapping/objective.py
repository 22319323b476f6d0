"""The weighted sum of loss terms. Weights live here only; a term never multiplies by its own."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.remapping.signals import Needs, Signals
from remap.tuning.base import Options


@dataclass(frozen=True)
class Pair:
    """The two sides a term may ask about when it is built. ``teacher`` is None when there is none."""

    student: Anatomy
    teacher: Anatomy | None
    num_classes: int

    def known_teacher(self, term: str) -> Anatomy:
        """The teacher's anatomy.

        Raises:
            BackboneError: There is no teacher.
        """
        if self.teacher is None:
            raise BackboneError(f"the loss '{term}' needs a teacher", do="name one, or leave this loss out")
        return self.teacher


class LossTerm(nn.Module):
    """One term of the objective.

    A term declares what it needs from both networks, reduces the teacher's signals to a compact target (which is
    what gets cached when the view of an image never changes), and returns a scalar from the student's signals and
    that target. Projectors are ordinary parameters of the term: trained, kept for resuming, dropped from the task.
    """

    Config: type[Options] = Options
    uses_teacher: bool = True
    uses_labels: bool = False

    def __init__(self, pair: Pair, config: Options) -> None:
        super().__init__()
        self.pair, self.config = pair, config

    def student_needs(self) -> Needs:
        return Needs()

    def teacher_needs(self) -> Needs:
        return Needs()

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        """What this term keeps of the teacher, one row an image (first dimension B); detached."""
        return {}

    @abstractmethod
    def forward(self, student: Signals, target: Mapping[str, Tensor], labels_B: Tensor) -> Tensor:
        """The unweighted loss, a float32 scalar, mean over the batch."""


class Objective(nn.Module):
    """Sum of ``weight * term`` over named terms."""

    def __init__(self, terms: Mapping[str, LossTerm], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)

    @property
    def uses_teacher(self) -> bool:
        return any(term.uses_teacher for term in self.terms.values())

    def student_needs(self) -> Needs:
        return _union([term.student_needs() for term in self.terms.values()])

    def teacher_needs(self) -> Needs:
        return _union([term.teacher_needs() for term in self.terms.values()])

    @torch.no_grad()
    def targets(self, teacher: Signals) -> dict[str, Tensor]:
        """The teacher's targets of all terms, flat: "term.name" -> tensor with one row an image."""
        # ``float()`` returns a float32 tensor itself, graph and all: detach whatever a term hands over.
        return {
            f"{name}.{key}": value.detach()
            for name, term in self.terms.items()
            if term.uses_teacher
            for key, value in term.target(teacher).items()
        }

    def forward(
        self, student: Signals, targets: Mapping[str, Tensor], labels_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and each term's unweighted value (detached)."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=labels_B.device)
        for name, term in self.terms.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in targets.items() if key.startswith(prefix)}
            value = term(student, own, labels_B)
            parts[name] = value.detach()
            total = total + self.weights[name] * value
        return total, parts


def _union(needs: Sequence[Needs]) -> Needs:
    result = Needs()
    for one in needs:
        result = result | one
    return result
