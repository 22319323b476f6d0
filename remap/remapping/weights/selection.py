"""Selections that look at shapes only: weight selection, and whole blocks."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from remap.backbones.families.tensor_axes import Place
from remap.errors import BackboneError
from remap.remapping.weights.base import (
    Images,
    WeightInit,
    differences,
    dimensions,
    evenly,
    plan_units,
    require_nowhere_larger,
)
from remap.remapping.weights.transfer import Plan, Side, UnitPlan
from remap.tuning.base import Options


class WeightSelection(WeightInit):
    """Weight selection (Xu et al. 2024, arXiv 2311.18823): the first blocks, and evenly spaced indices of every size.

    The same channels are taken wherever the residual stream is read or written. Other than in the paper's plain
    selection by tensor, queries, keys and values are selected apart, heads as wholes, and dimensions inside heads only
    where heads are smaller.
    """

    name = "weight_selection"

    def plan(self, teacher: Side, student: Side, sample: Images | None) -> Plan:
        require_nowhere_larger(self.name, teacher, student)
        one, other = teacher.layout, student.layout
        return Plan(evenly(one.width, other.width), even_units(teacher, student, range(other.depth)))


def even_units(teacher: Side, student: Side, blocks: Sequence[int]) -> dict[Place, UnitPlan | None]:
    """Return the plan of every unit of the student, by ``even_unit``; ``blocks`` are the teacher's, in order."""
    return plan_units(teacher, student, blocks, partial(even_unit, teacher, student))


def even_unit(teacher: Side, student: Side, place: Place, source: Place) -> UnitPlan:
    """Return evenly spaced heads, dimensions and MLP units."""
    one, other = teacher.layout.units[source], student.layout.units[place]
    rotary = teacher.layout.rotary if isinstance(place, int) else None
    return UnitPlan(
        source,
        evenly(one.heads, other.heads),
        dimensions(one.head_dim, other.head_dim, rotary),
        evenly(one.hidden, other.hidden) if one.hidden and other.hidden else (),
    )


class Layers(WeightInit):
    """Whole blocks of a deeper teacher (Sanh et al. 2019, arXiv 1910.01108, take every second one).

    ``uniform`` spreads them from the first to the last block.
    """

    class Config(Options):
        which: Literal["uniform", "first", "last"] = Field(
            default="uniform", description="Teacher blocks that the student takes."
        )

    config: Config
    name = "layers"

    def plan(self, teacher: Side, student: Side, sample: Images | None) -> Plan:
        other = [f"{what} {mine}, not {its}" for what, its, mine in differences(teacher, student) if what != "depth"]
        if other:
            raise BackboneError(
                "layers takes whole blocks, so all sizes but the depth must be equal",
                given=f"student: {', '.join(other)}",
                do="use weight_selection, which selects inside blocks too (student.init=weight_selection)",
            )
        require_nowhere_larger(self.name, teacher, student)
        its, mine = teacher.layout.depth, student.layout.depth
        blocks = {"first": range(mine), "last": range(its - mine, its), "uniform": spread(its, mine)}
        units = even_units(teacher, student, blocks[self.config.which])
        return Plan(tuple(range(teacher.layout.width)), units)


def spread(teacher: int, student: int) -> list[int]:
    """Return blocks from the first to the last at even distances, halves rounded up; a single one is the last."""
    if student == 1:
        return [teacher - 1]
    return [(2 * i * (teacher - 1) + student - 1) // (2 * (student - 1)) for i in range(student)]
