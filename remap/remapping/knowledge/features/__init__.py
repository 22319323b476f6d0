"""Losses on features and tokens; listing them imports no torch."""

from remap.remapping.entry import LossEntry

ROWS = [
    LossEntry(
        name="feature",
        target="remap.remapping.knowledge.features.pooled:PooledFeature",
        category="features",
        summary="projected pooled feature against the teacher's layer-normed one",
        paper="Miles et al. 2024, arXiv 2403.06213",
        needs="pooled features of both",
        signal="pooled",
        mismatch="widths by a projector that is dropped after training",
    ),
]
