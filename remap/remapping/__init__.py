"""Category 5 of the survey, remapping tuning. The table of losses; listing it imports no torch."""

from dataclasses import dataclass

from remap.registry import Entry, Registry


@dataclass(frozen=True, kw_only=True)
class LossEntry(Entry):
    """One loss term.

    Attributes:
        needs: What it reads: "labels", "logits", "pooled features", "queries and keys".
        weight: Default weight in the objective.
    """

    needs: str
    weight: float


LOSSES: Registry[LossEntry] = Registry(
    "loss",
    "losses",
    [
        LossEntry(
            name="ce",
            target="remap.remapping.knowledge.logits:CrossEntropy",
            category="labels",
            summary="cross-entropy with the labels",
            paper="-",
            needs="labels, student logits",
            weight=1.0,
        ),
        LossEntry(
            name="kd",
            target="remap.remapping.knowledge.logits:KnowledgeDistillation",
            category="logits",
            summary="KL of softened class probabilities, times T^2",
            paper="Hinton et al. 2015, arXiv 1503.02531",
            needs="logits of both",
            weight=1.0,
        ),
        LossEntry(
            name="dist",
            target="remap.remapping.knowledge.torchdistill_bridge:Dist",
            category="logits",
            summary="correlation of class probabilities within and across images (torchdistill's DISTLoss)",
            paper="Huang et al. 2022, arXiv 2205.10536",
            needs="logits of both",
            weight=1.0,
        ),
        LossEntry(
            name="attention",
            target="remap.remapping.knowledge.attention:AttentionTransfer",
            category="attention",
            summary="KL of attention maps of chosen blocks over the shared {class, patches} tokens",
            paper="Li et al. 2024, arXiv 2411.09702",
            needs="queries and keys of both",
            weight=1.0,
        ),
        LossEntry(
            name="feature",
            target="remap.remapping.knowledge.features:PooledFeature",
            category="features",
            summary="projected pooled feature against the teacher's layer-normed one",
            paper="Miles et al. 2024, arXiv 2403.06213",
            needs="pooled features of both",
            weight=1.0,
        ),
    ],
)
