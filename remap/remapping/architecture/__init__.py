"""The table of architecture remappings: cut the student from the teacher, or skip blocks. Imports no torch."""

from remap.registry import Registry
from remap.remapping.entries import RemappingEntry

ARCHITECTURES: Registry[RemappingEntry] = Registry(
    "architecture remapping",
    "remappings",
    [
        RemappingEntry(
            name="shrink",
            target="remap.remapping.architecture.shrink:shrink",
            category="architecture",
            summary="the student is cut from the teacher: whole blocks, heads, MLP units and channels",
            paper="Fang et al. 2023, arXiv 2301.12900",
            needs="a plain vision transformer as teacher; of EVA, DINOv3, BEiT and attention-pooled ones depth alone",
            mismatch="nowhere larger than the teacher; width = heads * head width, head width at most the teacher's",
        ),
        RemappingEntry(
            name="skip",
            target="remap.remapping.architecture.skip:Skip",
            category="architecture",
            summary="gates learn which frozen blocks to skip, with a cost of those that stay open (a tuning method)",
            paper="Morgado and Vasconcelos 2019, arXiv 1907.00274",
            needs="a backbone that is not read by its stages; taking closed blocks out, one list of equal blocks "
            "(vit, eva, beit)",
            mismatch="whole blocks go; gates of those that stay are folded into their weights",
        ),
    ],
)
