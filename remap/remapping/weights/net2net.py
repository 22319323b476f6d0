"""Net2Net: a larger student that computes what the smaller teacher does."""

import torch
from pydantic import Field
from torch import Tensor

from remap.backbones.families.tensor_axes import Place
from remap.backbones.typed import evaluating, input_channels, pooled_features
from remap.errors import BackboneError
from remap.remapping.weights.base import Images, WeightInit, differences, plan_units
from remap.remapping.weights.transfer import Plan, Side, Transferred, UnitPlan
from remap.tuning.base import Options

# Largest difference of features, relative to their largest value, that rounding explains.
TOLERANCE = 1e-4


class Net2Net(WeightInit):
    """Net2Net (Chen et al. 2016, arXiv 1511.05641) on transformers: deeper and wider without another function.

    Deeper: new blocks, spread between the teacher's, add nothing, because the last layers of both their branches are
    zero. Wider: channels, heads, their dimensions and MLP units are copied in turn, and layers that sum over copies
    share the weight out. Norms see the same statistics only if every channel is there equally often: width and head
    dimensions grow by whole factors.

    Copies that stay equal learn the same: ``noise`` draws them apart, at the price of a slightly other function.
    """

    class Config(Options):
        noise: float = Field(
            default=0.0, ge=0.0, description="Noise on copied weights, in standard deviations of their tensor."
        )

    config: Config
    name = "net2net"

    def plan(self, teacher: Side, student: Side, sample: Images | None) -> Plan:
        self._require_growth(teacher, student)
        one, other = teacher.layout, student.layout

        def unit(place: Place, source: Place) -> UnitPlan:
            its, mine = one.units[source], other.units[place]
            heads, dims = in_turn(its.heads, mine.heads), in_turn(its.head_dim, mine.head_dim)
            return UnitPlan(source, heads, dims, in_turn(its.hidden, mine.hidden))

        units = plan_units(teacher, student, spread_out(one.depth, other.depth), unit)
        return Plan(in_turn(one.width, other.width), units)

    def finish(self, teacher: Side, student: Side, plan: Plan, done: Transferred) -> list[str]:
        """Compare the two functions, then add the noise.

        Raises:
            BackboneError: They differ, because the models differ in more than size.
        """
        difference = function_difference(teacher, student, plan.width)
        if not difference <= TOLERANCE:
            raise BackboneError(
                "net2net: the student does not compute what the teacher does, so the models differ in more than size",
                given=f"features differ by {difference:.1e} of their largest value; "
                f"parts of the teacher that were left behind: {', '.join(done.left) or 'none'}",
                do="choose two models of one architecture (activation, norms, pooling), or use weight_selection",
            )
        notes = [f"the student's features differ from the teacher's by {difference:.1e} of their largest value"]
        if self.config.noise:
            count = self._add_noise(student, plan)
            notes.append(f"noise of {self.config.noise:g} standard deviations on {count} tensors with copies")
        return notes

    def _require_growth(self, teacher: Side, student: Side) -> None:
        problems = [f"{what} {mine} < {its}" for what, its, mine in differences(teacher, student) if mine < its]
        for what, its, mine in differences(teacher, student):
            if (what == "width" or what.endswith("head dimensions")) and mine > its and mine % its:
                problems.append(f"{what} {mine}, which is not a multiple of {its}")
            if what == "head dimensions" and teacher.layout.rotary is not None:
                problems.append(f"{what} {mine}, not {its}: rotated heads of another size turn at other frequencies")
        anatomies = (teacher.anatomy, student.anatomy)
        for what, get in (
            ("grid", lambda a: "x".join(map(str, a.grid))),
            ("image size", lambda a: "x".join(map(str, a.image_size))),
            ("number of prefix tokens", lambda a: a.num_prefix_tokens),
        ):
            its, mine = map(get, anatomies)
            if its != mine:
                problems.append(f"{what} {mine}, not {its}")
        if problems:
            raise BackboneError(
                "net2net grows the teacher without changing what it computes; this student is not such a growth",
                given=f"student: {'; '.join(problems)}",
                do="choose a student that is nowhere smaller, with a whole multiple of the teacher's width, or select "
                "from a larger teacher (weight_selection)",
            )

    def _add_noise(self, student: Side, plan: Plan) -> int:
        """Add noise to matrices of units with copies of channels, heads, dimensions or MLP units; return how many."""
        count = 0
        for (place, _), piece in student.layout.pieces.items():
            unit = plan.units.get(place)
            if unit is None or len(piece.axes) != 2 or not any(axis.reads for axis in piece.axes):
                continue
            if any(len(set(i)) < len(i) for i in (plan.width, unit.heads, unit.dims, unit.hidden)):
                weight = piece.of(student.model)
                weight.add_(torch.randn_like(weight) * weight.std() * self.config.noise)
                count += 1
        return count


def in_turn(teacher: int, student: int) -> tuple[int, ...]:
    """Return ``student`` indices: 0 to teacher - 1, repeated."""
    return tuple(index % teacher for index in range(student)) if teacher else ()


def spread_out(teacher: int, student: int) -> list[int | None]:
    """Return the teacher's blocks at even distances among the student's, the first one first; None for new blocks."""
    blocks: list[int | None] = [None] * student
    for index in range(teacher):
        blocks[index * student // teacher] = index
    return blocks


def function_difference(teacher: Side, student: Side, width: tuple[int, ...]) -> float:
    """Return the largest difference of the pooled features on noise, relative to their largest value."""
    images = torch.randn(
        2, input_channels(teacher.model), *teacher.anatomy.image_size, generator=torch.Generator().manual_seed(0)
    )
    found: list[Tensor] = []
    for side in (teacher, student):
        with evaluating(side.model):
            features = pooled_features(side.model, images.to(next(side.model.parameters())))
        found.append(features.double().cpu())
    wanted = found[0][:, list(width)]
    return float((found[1] - wanted).abs().max() / wanted.abs().max())
