"""Losses on attention; listing them imports no torch."""

from remap.remapping.entry import LossEntry

ROWS = [
    LossEntry(
        name="attention",
        target="remap.remapping.knowledge.attention.transfer:AttentionTransfer",
        category="attention",
        summary="KL of attention maps of chosen blocks over the shared {class, patches} tokens",
        paper="Li et al. 2024, arXiv 2411.09702",
        needs="queries and keys of both",
        signal="attention",
        mismatch="heads averaged; grids resized on rows and columns; prompts, registers and unshared class tokens cut",
    ),
]
