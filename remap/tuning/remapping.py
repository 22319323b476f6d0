"""Category 5 of the survey, remapping tuning, as a tuning method. The class is in ``remap.remapping``."""

from remap.tuning.entry import MethodEntry

ROWS = [
    MethodEntry(
        name="skip",
        target="remap.remapping.architecture.skip:Skip",
        category="remapping",
        summary="a gate on every block, under a price; blocks whose gates close can be taken out",
        paper="Morgado and Vasconcelos 2019, arXiv 1907.00274",
        trains="L",
        vit_base=12,
        mergeable=True,
        lr=1e-2,
    ),
]
