"""Losses on labels and logits; listing them imports no torch."""

from remap.remapping.entry import LossEntry

ROWS = [
    LossEntry(
        name="ce",
        target="remap.remapping.knowledge.logits.plain:CrossEntropy",
        category="labels",
        summary="cross-entropy with the labels",
        paper="-",
        needs="labels, student logits",
        signal="logits",
        mixed="cross-entropy with the mixed distribution",
    ),
    LossEntry(
        name="kd",
        target="remap.remapping.knowledge.logits.plain:KnowledgeDistillation",
        category="logits",
        summary="KL of softened class probabilities, times T^2",
        paper="Hinton et al. 2015, arXiv 1503.02531",
        needs="logits of both",
        signal="logits",
    ),
    LossEntry(
        name="dist",
        target="remap.remapping.knowledge.torchdistill_bridge:Dist",
        category="logits",
        summary="correlation of class probabilities within and across images (torchdistill's DISTLoss)",
        paper="Huang et al. 2022, arXiv 2205.10536",
        needs="logits of both",
        signal="logits",
        over_batch=True,
    ),
]
