"""Losses between images with labels and those of another domain without; listing them imports no torch."""

from functools import partial

from remap.remapping.entries import LossEntry

_row = partial(LossEntry, category="domains", mixed="refused with data.target")
_pooled = partial(_row, needs="student pooled features", signal="pooled", over_batch=True)

ROWS = [
    _row(
        name="mean_teacher",
        target="remap.remapping.knowledge.domains.mean_teacher:MeanTeacher",
        summary="cross-entropy with confident pseudo-labels of the student's running average, on images without labels",
        paper="Tarvainen and Valpola 2017, arXiv 1703.01780; Sohn et al. 2020, arXiv 2001.07685",
        needs="logits of the student and of its running average, which sees the images without augmentation",
        signal="logits",
        of_average=True,
    ),
    _pooled(
        name="coral",
        target="remap.remapping.knowledge.domains.alignment:Coral",
        summary="squared difference of the covariances of both domains' pooled features",
        paper="Sun and Saenko 2016, arXiv 1607.01719",
    ),
    _pooled(
        name="mmd",
        target="remap.remapping.knowledge.domains.alignment:MeanDiscrepancy",
        summary="distance of the mean embeddings of both domains' pooled features, several Gaussian kernels",
        paper="Long et al. 2015, arXiv 1502.02791",
    ),
    _row(
        name="infomax",
        target="remap.remapping.knowledge.domains.infomax:InformationMaximization",
        summary="confident outputs on images without labels, spread over the classes",
        paper="Liang et al. 2020, arXiv 2002.08546",
        needs="student logits",
        signal="logits",
        over_batch=True,
    ),
]
