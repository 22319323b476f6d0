"""Losses on labels and logits; listing them imports no torch."""

from functools import partial

from remap.remapping.entries import LossEntry

_ONE_CLASS = "the class with the larger share; without a label, the teacher's most likely one"
_row = partial(LossEntry, category="logits", signal="logits")

ROWS = [
    _row(
        name="ce",
        target="remap.remapping.knowledge.logits.distillation:CrossEntropy",
        category="labels",
        summary="cross-entropy with the labels",
        paper="-",
        needs="labels, student logits",
        mixed="cross-entropy with the mixed distribution",
        multilabel="remap.remapping.knowledge.logits.multilabel:BinaryCrossEntropy",
    ),
    _row(
        name="kd",
        target="remap.remapping.knowledge.logits.distillation:KnowledgeDistillation",
        summary="KL of softened class probabilities, times T^2; or on the scale of another tool",
        paper="Hinton et al. 2015, arXiv 1503.02531",
        needs="logits of both",
        multilabel="remap.remapping.knowledge.logits.multilabel:BernoulliDistillation",
    ),
    _row(
        name="hard",
        target="remap.remapping.knowledge.logits.distillation:HardDistillation",
        summary="cross-entropy with the teacher's most likely class",
        paper="Touvron et al. 2021, arXiv 2012.12877",
        needs="logits of both",
        mixed="the teacher's class of the mixed image",
    ),
    _row(
        name="dkd",
        target="remap.remapping.knowledge.logits.decoupled:DecoupledDistillation",
        summary="KL of the image's class against all others, and KL among the others, weighted apart",
        paper="Zhao et al. 2022, arXiv 2203.08679",
        needs="labels, logits of both",
        mixed=_ONE_CLASS,
    ),
    _row(
        name="nkd",
        target="remap.remapping.knowledge.logits.decoupled:NormalizedDistillation",
        summary="cross-entropy on the image's class and, made to sum to 1, on the others",
        paper="Yang et al. 2023, arXiv 2303.13005",
        needs="labels, logits of both",
        mixed=_ONE_CLASS,
    ),
    _row(
        name="mlkd",
        target="remap.remapping.knowledge.logits.multilevel:MultiLevelDistillation",
        summary="KL at several temperatures, with Gram matrices of images and of classes",
        paper="Jin et al. 2023, CVPR",
        needs="logits of both",
        over_batch=True,
    ),
    _row(
        name="logit_std",
        target="remap.remapping.knowledge.logits.standardized:LogitStandardization",
        summary="z-scores of the logits in front of kd, dkd, nkd, dist or mlkd",
        paper="Sun et al. 2024, arXiv 2403.01427",
        needs="logits of both; labels for dkd and nkd",
        mixed="as the loss behind it",
        weight=9.0,
    ),
    _row(
        name="dist",
        target="remap.remapping.knowledge.torchdistill_bridge:Dist",
        summary="correlation of class probabilities within and across images (torchdistill's DISTLoss)",
        paper="Huang et al. 2022, arXiv 2205.10536",
        needs="logits of both",
        over_batch=True,
    ),
    _row(
        name="affinity",
        target="remap.remapping.knowledge.logits.affinity:Affinity",
        summary="cross-entropy of each image's classes, and of each class's images in the batch",
        paper="Wu et al. 2023, arXiv 2309.12314",
        needs="logits of both",
        over_batch=True,
    ),
]
