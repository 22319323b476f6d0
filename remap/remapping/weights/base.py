"""Initialise a student from its teacher: what an initialisation decides, and the report of what came from where."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families.tensor_axes import POOL, Place, Rotary, Unit, layout_of
from remap.errors import BackboneError
from remap.remapping.weights.transfer import Plan, Side, Transferred, UnitPlan, transfer
from remap.tuning.base import Options

Images = Iterable[Tensor]


class ReadModel(Protocol):
    """A built model with its anatomy: a backbone or a network."""

    model: nn.Module
    anatomy: Anatomy


@dataclass(frozen=True)
class Report:
    """Where an initialised student's weights come from.

    Attributes:
        init: Name of the initialisation.
        blocks: For each student block the teacher block it comes from; None for a new one.
        copied: Pairs (part of the student, part of the teacher).
        neutral: Parts that the teacher has no counterpart of, set to what changes nothing (0, or 1 for a scale).
        kept: Pairs (part of the student that keeps its own initial values, why).
        left: Parts of the teacher that no part of the student takes.
        notes: What else is worth a line.
    """

    init: str
    blocks: tuple[Place | None, ...]
    copied: tuple[tuple[str, str], ...]
    neutral: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The report in plain words, blocks counted from 0."""
        blocks = ", ".join("new" if block is None else str(block) for block in self.blocks)
        lines = [
            f"{self.init}: the student's blocks start from the teacher's blocks {blocks}",
            *self.notes,
            f"{len(self.copied)} parts come from the teacher; the classifier does not",
        ]
        if self.neutral:
            lines.append(f"set to change nothing, since the teacher has none: {_some(self.neutral)}")
        if self.kept:
            lines.append(f"with their own initial values: {_some([f'{name} ({why})' for name, why in self.kept])}")
        if self.left:
            lines.append(f"left behind, since the student has none: {_some(self.left)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "copied": len(self.copied)}


class WeightInit(ABC):
    """One way to choose, for every index of the student, the teacher's index it comes from."""

    Config: type[Options] = Options
    name: str

    def __init__(self, config: Options) -> None:
        self.config = config

    @abstractmethod
    def plan(self, teacher: Side, student: Side, sample: Images | None) -> Plan:
        """Return the choice. Changes neither model.

        Raises:
            BackboneError: It cannot be made for these two models.
        """

    def finish(self, teacher: Side, student: Side, plan: Plan, done: Transferred) -> list[str]:
        """Act on the transferred weights; return notes for the report."""
        return []


@torch.no_grad()
def remap_weights(init: WeightInit, teacher: ReadModel, student: ReadModel, sample: Images | None = None) -> Report:
    """Initialise the student's backbone from the teacher's weights, in place. The classifier stays as it is.

    Args:
        sample: Batches of training images (B, 3, S, S) as the teacher's backbone takes them, on its device.

    Raises:
        BackboneError: The two models do not fit each other or the initialisation; the student is then unchanged.
    """
    if teacher.anatomy.family != student.anatomy.family:
        raise BackboneError(
            f"{init.name} needs two models of one family",
            given=f"teacher of the family '{teacher.anatomy.family}', student of '{student.anatomy.family}'",
            do=f"choose a student of the teacher's family ('{teacher.anatomy.family}'), or leave student.init out",
        )
    one, other = (Side(p.model, p.anatomy, layout_of(p.model, p.anatomy)) for p in (teacher, student))
    _require_same_kind(init.name, one, other)
    plan = init.plan(one, other, sample)
    done = transfer(one, other, plan)
    notes = (_sizes(one, other), *init.finish(one, other, plan, done))
    units = [plan.units[block] for block in range(other.layout.depth)]
    blocks = tuple(None if unit is None else unit.source for unit in units)
    parts = tuple(done.copied), tuple(done.neutral), tuple(done.kept), tuple(done.left)
    return Report(init.name, blocks, *parts, notes)


def evenly(teacher: int, student: int) -> tuple[int, ...]:
    """Return ``student`` of ``teacher`` indices at even distances (Xu et al. 2024).

    That is every n-th where the sizes divide, else those nearest to the even division of [0, teacher - 1].
    """
    if teacher % student == 0:
        return tuple(range(0, teacher, teacher // student))
    gaps, span = student - 1, teacher - 1
    return tuple((2 * i * span + gaps) // (2 * gaps) if gaps else 0 for i in range(student))


def dimensions(teacher: int, student: int, rotary: Rotary | None) -> tuple[int, ...]:
    """Return evenly spaced dimensions of a head.

    Where queries and keys are rotated, pairs of them stay together, so that each pair keeps (nearly) the frequency it
    was trained with.
    """
    if teacher == student or rotary is None:
        return evenly(teacher, student)
    if rotary.by_axis:
        first = evenly(teacher // 4, student // 4)
        pairs = (*first, *(teacher // 4 + pair for pair in first))
    else:
        pairs = evenly(teacher // 2, student // 2)
    if rotary.half:
        return (*pairs, *(teacher // 2 + pair for pair in pairs))
    return tuple(dim for pair in pairs for dim in (2 * pair, 2 * pair + 1))


def require_nowhere_larger(init: str, teacher: Side, student: Side) -> None:
    """Raise a BackboneError where the student is larger: selections can only make a model smaller."""
    larger = [f"{what} {mine} > {its}" for what, its, mine in differences(teacher, student) if mine > its]
    if larger:
        raise BackboneError(
            f"{init} selects from the teacher, so the student may be larger in nothing",
            given=", ".join(larger),
            do="choose a smaller student or a larger teacher, or grow the student with net2net",
        )
    rotary = teacher.layout.rotary
    other_heads = any(what == "head dimensions" for what, *_ in differences(teacher, student))
    if other_heads and rotary is not None and rotary.by_axis is None:
        raise BackboneError(f"{init} cannot select dimensions of heads that are rotated by {rotary.kind}")


def differences(teacher: Side, student: Side) -> list[tuple[str, int, int]]:
    """Return what differs in size: (what, teacher's, student's); units by the first block."""
    one, other = teacher.layout, student.layout
    pairs = [("depth", one.depth, other.depth), ("width", one.width, other.width)]
    pairs += _unit_sizes("", one.units[0], other.units[0])
    if POOL in one.units and POOL in other.units:
        pairs += _unit_sizes("attention pool's ", one.units[POOL], other.units[POOL])
    return [pair for pair in pairs if pair[1] != pair[2]]


def plan_units(
    teacher: Side, student: Side, blocks: Sequence[int | None], unit: Callable[[Place, Place], UnitPlan]
) -> dict[Place, UnitPlan | None]:
    """Return the plan of every unit of the student, None for a new one.

    Args:
        blocks: The teacher's block of each of the student's, None for new ones.
        unit: Returns the plan for a place of the student and the place of the teacher.
    """
    sources: dict[Place, Place | None] = dict(enumerate(blocks))
    if POOL in student.layout.units:
        sources[POOL] = POOL if POOL in teacher.layout.units else None
    return {place: None if source is None else unit(place, source) for place, source in sources.items()}


def _unit_sizes(whose: str, one: Unit, other: Unit) -> list[tuple[str, int, int]]:
    return [
        (f"{whose}heads", one.heads, other.heads),
        (f"{whose}head dimensions", one.head_dim, other.head_dim),
        (f"{whose}MLP units", one.hidden, other.hidden),
    ]


def _sizes(teacher: Side, student: Side) -> str:
    found = [f"{what} {mine} of {its}" for what, its, mine in differences(teacher, student)]
    return f"sizes, student's of teacher's: {', '.join(found)}" if found else "both models have the same sizes"


def _require_same_kind(init: str, teacher: Side, student: Side) -> None:
    one, other = teacher.layout, student.layout
    if one.gated != other.gated:
        kinds = [("gated" if layout.gated else "plain") for layout in (one, other)]
        raise BackboneError(
            f"{init}: the two models have MLPs of another kind", given=f"teacher {kinds[0]}, student {kinds[1]}"
        )
    rotations = [_rotation(layout.rotary) for layout in (one, other)]
    if one.rotary != other.rotary:
        raise BackboneError(
            f"{init}: the two models place their tokens in another way, so queries and keys mean something else",
            given=f"teacher {rotations[0]}, student {rotations[1]}",
        )
    # Blocks of unequal shape inside one model would need a plan for each.
    for side, layout in (("teacher", one), ("student", other)):
        if len({layout.units[i] for i in range(layout.depth)}) > 1:
            raise BackboneError(f"{init}: the {side}'s blocks have unequal sizes")


def _rotation(rotary: Rotary | None) -> str:
    return "no rotation" if rotary is None else f"{rotary.kind}{' (half)' if rotary.half else ''}"


def _some(names: Sequence[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
