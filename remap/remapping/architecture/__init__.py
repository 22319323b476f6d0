"""Remapping the architecture. The table of ways; listing it imports no torch."""

from remap.registry import Entry, Registry

ARCHITECTURES: Registry[Entry] = Registry(
    "architecture remapping",
    "losses",
    [
        Entry(
            name="shrink",
            target="remap.remapping.architecture.shrink:shrink",
            category="student",
            summary="the student is cut from the teacher: whole blocks, heads, MLP units and channels",
            paper="Fang et al. 2023, arXiv 2301.12900; Molchanov et al. 2019, arXiv 1906.10771",
        ),
        Entry(
            name="skip",
            target="remap.remapping.architecture.skip:Skip",
            category="method",
            summary="gates learn which frozen blocks to skip, under a price for each",
            paper="Morgado and Vasconcelos 2019, arXiv 1907.00274",
        ),
    ],
)
