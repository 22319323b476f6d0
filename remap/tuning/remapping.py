"""Category 5 of the survey, remapping tuning, as tuning methods. The classes are in ``remap.remapping``."""

from remap.tuning.entry import L, MethodEntry

ROWS = [
    MethodEntry(
        name="skip",
        target="remap.remapping.architecture.skip:Skip",
        category="remapping",
        summary="a gate on every block, with a cost of open ones; blocks whose gates reach 0 can be removed",
        paper="Morgado and Vasconcelos 2019, arXiv 1907.00274",
        trains="L",
        vit_base=L,
        lr=1e-1,
        needs=frozenset({"blocks"}),
    ),
    MethodEntry(
        name="attention_copy",
        target="remap.remapping.knowledge.attention.attention_copy:AttentionCopy",
        category="remapping",
        summary="blocks attend with a teacher's maps instead of their own, in prediction too",
        paper="Li et al. 2024, arXiv 2411.09702",
        trains="0",
        vit_base=0,
        mergeable=False,
        lr=1e-1,
        unchanged=frozenset({"attention"}),
        needs=frozenset({"sequence"}),
        of_images=True,
    ),
]
