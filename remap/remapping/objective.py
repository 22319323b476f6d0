"""The weighted sum of loss terms. Weights live here only; a term never multiplies by its own."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.remapping.labels import Labels
from remap.remapping.normalization import TargetNorm
from remap.remapping.schedule import TEMPERATURE, WEIGHT, Schedule
from remap.remapping.signals import Needs, Signals
from remap.tuning.base import Options


@dataclass(frozen=True)
class Pair:
    """The two sides a term may ask about when it is built. ``teacher`` is None when there is none."""

    student: Anatomy
    teacher: Anatomy | None
    num_classes: int

    def known_teacher(self, term: str) -> Anatomy:
        """Return the teacher's anatomy; without a teacher, raise a BackboneError."""
        if self.teacher is None:
            raise BackboneError(f"the loss '{term}' needs a teacher", do="name one, or leave this loss out")
        return self.teacher


class LossTerm(nn.Module):
    """One term of the objective.

    A term declares what it needs from both networks, reduces the teacher's signals to compact items (which are kept
    when the view of an image never changes), and returns a scalar from the student's signals and those items.
    Projectors are ordinary parameters of the term: trained, kept for resuming, dropped from the task.

    Attributes:
        compares_domains: Whether it learns from images without labels of another domain, with or without a teacher.
        classifier: Which classifier it trains where a student has one for the labels and one for the teacher
            (distilled DeiT); None where it trains none.
        blocks: Which student block learns from which teacher block, as (student, teacher) counted from 0; the number
            of blocks stands for the tokens behind the final norm. Empty for terms that look into no block.
    """

    Config: type[Options] = Options
    uses_teacher: bool = True
    compares_domains: bool = False
    classifier: Literal["labels", "teacher"] | None = None
    blocks: tuple[tuple[int, int], ...] = ()

    def __init__(self, pair: Pair, config: Options) -> None:
        super().__init__()
        self.pair, self.config = pair, config
        self._unscaled = config

    @classmethod
    def temperatures_of(cls, config: Options) -> dict[str, Any]:
        """Return the options that are temperatures, numbers or tuples of numbers; empty where none is used."""
        found = {name: getattr(config, name, None) for name in ("temperature", "temperatures")}
        return {name: value for name, value in found.items() if value is not None}

    def scale_temperature(self, factor: float) -> None:
        """Set the temperatures to those of the options, times a factor."""
        temperatures = self.temperatures_of(self._unscaled)
        scaled = {
            name: tuple(factor * one for one in value) if isinstance(value, tuple) else factor * value
            for name, value in temperatures.items()
        }
        self.config = self._unscaled.model_copy(update=scaled)

    def after_step(self) -> None:
        """Follow an update of the student, for terms that remember something from step to step."""

    def student_needs(self) -> Needs:
        return self.reads(frozenset(student for student, _ in self.blocks))

    def teacher_needs(self) -> Needs:
        return self.reads(frozenset(teacher for _, teacher in self.blocks))

    def reads(self, blocks: frozenset[int]) -> Needs:
        """Return what it needs of a network whose blocks it looks into are these."""
        return Needs()

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        """Return what this term reads of the teacher, one row an image (first dimension B), detached.

        An item's name says all about it besides the teacher: terms whose items have the same name share one, and it
        is kept on disk under that name. ``remap.remapping.targets`` has the names.
        """
        return {}

    def normalizers(self) -> Mapping[str, TargetNorm]:
        """Return what normalises items, by the item's name."""
        return {}

    @abstractmethod
    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Return the unweighted loss, a float32 scalar, mean over the batch."""


class Objective(nn.Module):
    """Sum of ``weight * term`` over named terms.

    Args:
        weights: The weight of each term; where it has a schedule, that at a factor of 1.
        teacher_of: Which teacher each term listens to, by its number; 0 for those left out.
        over_batch: The terms that compare the images of a batch with each other.
        weight_schedules, temperature_schedules: Of terms whose weight or temperature changes.
    """

    def __init__(
        self,
        terms: Mapping[str, LossTerm],
        weights: Mapping[str, float],
        teacher_of: Mapping[str, int] | None = None,
        *,
        over_batch: Collection[str] = (),
        weight_schedules: Mapping[str, Schedule] | None = None,
        temperature_schedules: Mapping[str, Schedule] | None = None,
    ) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.teacher_of = {name: (teacher_of or {}).get(name, 0) for name in terms}
        self.weight_schedules, self.temperature_schedules = weight_schedules or {}, temperature_schedules or {}
        self.over_batch = frozenset(over_batch)
        self._factors: dict[str, float] = {}
        self._shares: dict[int, float] = {}
        trained = {term.classifier for name, term in terms.items() if self.weights[name]}
        self._both_classifiers = {"labels", "teacher"} <= trained

    def set_progress(
        self, update: int, steps_per_epoch: int, epochs: int, teacher_shares: Mapping[str, float] | None = None
    ) -> None:
        """Set scheduled weights and temperatures to those of an update, counted from 0 over the whole run.

        Args:
            teacher_shares: What the terms of a teacher, by its number, are multiplied by; 1 for those left out.
        """
        self._shares = {int(number): share for number, share in (teacher_shares or {}).items()}
        for name, schedule in self.weight_schedules.items():
            self._factors[name] = schedule.factor(update, steps_per_epoch, epochs)
        for name, schedule in self.temperature_schedules.items():
            self._named_terms()[name].scale_temperature(schedule.factor(update, steps_per_epoch, epochs))

    def scheduled(self) -> dict[str, float]:
        """Return the weights and temperatures that change, as they are now; of several temperatures the first."""
        changed = [name for name in self.terms if name in self.weight_schedules or self._share(name) < 1.0]
        found = {f"{name}{WEIGHT}": self._weight(name) for name in changed}
        for name in self.temperature_schedules:
            term = self._named_terms()[name]
            value = next(iter(term.temperatures_of(term.config).values()))
            found[f"{name}{TEMPERATURE}"] = value[0] if isinstance(value, tuple) else value
        return found

    def _weight(self, name: str) -> float:
        return self.weights[name] * self._factors.get(name, 1.0) * self._share(name)

    def _share(self, name: str) -> float:
        return self._shares.get(self.teacher_of[name], 1.0) if self._named_terms()[name].uses_teacher else 1.0

    def after_step(self) -> None:
        """Call it after each update of the student."""
        for term in self._named_terms().values():
            term.after_step()

    @property
    def follows_updates(self) -> bool:
        """Whether a term remembers something from update to update."""
        return any(type(term).after_step is not LossTerm.after_step for term in self._named_terms().values())

    @property
    def uses_teacher(self) -> bool:
        return any(term.uses_teacher for term in self._named_terms().values())

    @property
    def learns_unlabeled(self) -> bool:
        """Whether any term learns from images without labels."""
        return any(term.uses_teacher or term.compares_domains for term in self._named_terms().values())

    def reads_teacher(self, teacher: int) -> bool:
        """Return whether any term uses this teacher."""
        return bool(self.terms_of(teacher))

    def student_needs(self, over_batch: bool | None = None) -> Needs:
        """Return what the terms read of the student: of all, or as for ``forward``."""
        return _union([term.student_needs() for term in self._named_terms(over_batch).values()])

    def teacher_needs(self, teacher: int = 0) -> Needs:
        return _union([term.teacher_needs() for term in self.terms_of(teacher)])

    @torch.no_grad()
    def targets(self, signals: Signals, teacher: int = 0) -> dict[str, Tensor]:
        """Return the items of one teacher that its terms want, by item name, one row an image."""
        found: dict[str, Tensor] = {}
        for term in self.terms_of(teacher):
            # ``float()`` returns a float32 tensor itself, graph and all: detach what a term returns.
            found |= {key: value.detach() for key, value in term.target(signals).items() if key not in found}
        return found

    def unsettled(self, teacher: int) -> list[tuple[str, TargetNorm]]:
        """Return what has to see items of this teacher before the first step, with the names of the items."""
        found = [item for term in self.terms_of(teacher) for item in term.normalizers().items()]
        return [(name, norm) for name, norm in found if norm.wants_statistics]

    def forward(
        self, student: Signals, targets: Sequence[Mapping[str, Tensor]], labels: Labels, over_batch: bool | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and each term's unweighted value (detached).

        Without a loss for each of two classifiers, losses read their mean, which is the student's answer: else one of
        them would stay as it was drawn.

        Args:
            targets: The items of each teacher.
            over_batch: Only the terms that compare the images of a batch, or only the others; None takes all.
        """
        if not self._both_classifiers:
            student = replace(student, head_logits=())
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=labels.classes_B.device)
        for name, term in self._named_terms(over_batch).items():
            value = term(student, targets[self.teacher_of[name]] if term.uses_teacher else {}, labels)
            parts[name] = value.detach()
            total = total + self._weight(name) * value
        return total, parts

    def _named_terms(self, over_batch: bool | None = None) -> dict[str, LossTerm]:
        named = {name: cast(LossTerm, term) for name, term in self.terms.items()}
        if over_batch is None:
            return named
        return {name: term for name, term in named.items() if (name in self.over_batch) == over_batch}

    def terms_of(self, teacher: int, over_batch: bool | None = None) -> list[LossTerm]:
        """Return the terms that read this teacher: all, or as for ``forward``."""
        named = self._named_terms(over_batch)
        return [term for name, term in named.items() if term.uses_teacher and self.teacher_of[name] == teacher]


def _union(needs: Sequence[Needs]) -> Needs:
    return reduce(Needs.__or__, needs, Needs())
