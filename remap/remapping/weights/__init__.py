"""Remapping weights: the student starts from the teacher's. The table; listing it imports no torch."""

from dataclasses import dataclass

from remap.registry import Registry
from remap.remapping.entries import RemappingEntry


@dataclass(frozen=True, kw_only=True)
class InitEntry(RemappingEntry):
    """One way to initialise a student; ``reads_images``: it looks at training images."""

    reads_images: bool = False


INITS: Registry[InitEntry] = Registry(
    "initialisation",
    "remappings",
    [
        InitEntry(
            name="weight_selection",
            target="remap.remapping.weights.selection:WeightSelection",
            category="weights",
            summary="the first blocks, and evenly spaced channels, heads and MLP units of them",
            paper="Xu et al. 2024, arXiv 2311.18823",
            needs="a teacher of the same family that is nowhere smaller",
            mismatch="width, heads, head dimensions and MLP units: evenly spaced; depth: the first blocks",
        ),
        InitEntry(
            name="layers",
            target="remap.remapping.weights.selection:Layers",
            category="weights",
            summary="whole blocks of a deeper teacher of the same width: uniform, first or last ones",
            paper="Sanh et al. 2019, arXiv 1910.01108",
            needs="a teacher of the same family, width, heads and MLP that is at least as deep",
            mismatch="depth: the blocks that 'which' names; all else must be equal",
        ),
        InitEntry(
            name="subclone",
            target="remap.remapping.weights.subclone:Subclone",
            category="weights",
            summary="the most active channels, heads and MLP units on training images, without the middle blocks",
            paper="Samragh et al. 2023, arXiv 2312.09299",
            needs="a teacher of the same family that is nowhere smaller, and training images",
            mismatch="width, heads, MLP units: the largest mean |activation|; head dimensions: evenly spaced; "
            "depth: the first and the last blocks",
            reads_images=True,
        ),
        InitEntry(
            name="net2net",
            target="remap.remapping.weights.net2net:Net2Net",
            category="weights",
            summary="a larger student that computes what the smaller teacher does",
            paper="Chen et al. 2016, arXiv 1511.05641",
            needs="a teacher of the same family, grid and tokens that is nowhere larger",
            mismatch="width and head dimensions: whole multiples, copied; heads and MLP units: copied, their outgoing "
            "weights shared out; depth: new blocks that add nothing",
        ),
    ],
)
