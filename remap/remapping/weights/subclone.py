"""Weight subcloning: the student takes what is most active in the teacher."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import module_at
from remap.backbones.families.tensor_axes import POOL, Place
from remap.backbones.typed import as_timm, evaluating
from remap.errors import BackboneError
from remap.remapping.weights.base import Images, WeightInit, differences, dimensions, plan_units, require_nowhere_larger
from remap.remapping.weights.selection import even_unit
from remap.remapping.weights.transfer import Plan, Side, UnitPlan


class Subclone(WeightInit):
    """Weight subcloning (Samragh et al. 2023, arXiv 2312.09299).

    A neuron's importance is its mean |activation| over images and tokens: for channels at the outputs of all blocks,
    for heads at the input of the output projection, for MLP units at the input of the second layer. The channels are
    the same throughout the model, heads and units are chosen for each block. Where the student is shallower, the
    teacher's middle blocks are left out. Dimensions inside heads, where heads are smaller, are evenly spaced.
    """

    name = "subclone"

    def plan(self, teacher: Side, student: Side, sample: Images | None) -> Plan:
        require_nowhere_larger(self.name, teacher, student)
        blocks = outer_blocks(teacher.layout.depth, student.layout.depth)
        found = Importance(teacher)
        if any(what != "depth" for what, *_ in differences(teacher, student)):
            if sample is None:
                raise BackboneError("subclone needs training images to see what is active in the teacher")
            found.measure(sample)
        units = plan_units(teacher, student, blocks, partial(self._unit, found, teacher, student))
        return Plan(found.largest("width", None, student.layout.width), units)

    def _unit(self, found: "Importance", teacher: Side, student: Side, place: Place, source: Place) -> UnitPlan:
        one, other = teacher.layout.units[source], student.layout.units[place]
        if source == POOL:
            return even_unit(teacher, student, place, source)
        # One shared table of relative positions gives every head the same meaning in all blocks.
        where = None if teacher.layout.shares_table else source
        return UnitPlan(
            source,
            found.largest("heads", where, other.heads),
            dimensions(one.head_dim, other.head_dim, teacher.layout.rotary),
            found.largest("hidden", source, other.hidden),
        )


def outer_blocks(teacher: int, student: int) -> list[int]:
    """Return the first and the last blocks; of an odd number, one more of the first."""
    first = (student + 1) // 2
    return [*range(first), *range(teacher - (student - first), teacher)]


class Importance:
    """Mean |activation| of a teacher's channels, heads and MLP units."""

    def __init__(self, teacher: Side) -> None:
        self.teacher = teacher
        unit = teacher.layout.units[0]
        self._sizes = {"width": teacher.layout.width, "heads": unit.heads, "hidden": unit.hidden}
        self._sums: dict[tuple[str, Place], Tensor] = {}

    def measure(self, sample: Images) -> None:
        """Run the images through the teacher, in eval mode.

        Raises:
            BackboneError: There is no image.
        """
        model, count = self.teacher.model, 0
        with self._watched(), evaluating(model):
            for pixels_BCHW in sample:
                count += len(pixels_BCHW)
                as_timm(model).forward_features(pixels_BCHW)
        if not count:
            raise BackboneError("subclone needs at least one training image")

    def largest(self, what: str, block: Place | None, count: int) -> tuple[int, ...]:
        """Return the ``count`` most important indices in ascending order; of equal ones the first.

        Args:
            block: None stands for all blocks together.
        """
        size = self._sizes[what]
        if count == size:
            return tuple(range(size))
        indices: Iterable[Place] = range(self.teacher.layout.depth) if block is None else [block]
        scores = reduce(torch.add, (self._sums[what, index] for index in indices))
        return tuple(sorted(scores.sort(descending=True, stable=True).indices[:count].tolist()))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        model, handles = self.teacher.model, []
        for index, block in enumerate(self.teacher.anatomy.blocks):
            module, projections = module_at(model, block.block), block.projections
            handles.append(module.register_forward_hook(self._adder("width", index, of_output=True)))
            for what, word in (("heads", "o"), ("hidden", "fc2")):
                layer = module_at(model, projections[word].path)
                handles.append(layer.register_forward_hook(self._adder(what, index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adder(self, what: str, index: int, *, of_output: bool = False) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple, output: Tensor) -> None:
            x_BTX = output if of_output else args[0]
            total = x_BTX.detach().abs().flatten(0, -2).to(torch.float64).sum(0).cpu()
            if what == "heads":  # all dimensions of a head together
                total = total.reshape(self._sizes["heads"], -1).sum(1)
            before = self._sums.get((what, index))
            self._sums[what, index] = total if before is None else before + total

        return add
