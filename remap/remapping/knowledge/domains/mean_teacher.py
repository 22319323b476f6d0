"""Self-training by the student's running average. B batch, C classes."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.remapping.knowledge.logits.distillation import LogitsTerm
from remap.remapping.labels import Labels
from remap.tuning.base import Options


class MeanTeacher(LogitsTerm):
    """Cross-entropy with the running average's class, where it is confident; mean over all images without labels.

    The average as a teacher is Tarvainen and Valpola 2017, arXiv 1703.01780. The class of the weak view as the target
    of the strong one, and the threshold, are Eq. 4 of Sohn et al. 2020 (FixMatch), arXiv 2001.07685. The weak view here
    is the image without augmentation. Images with labels count nothing.
    """

    compares_domains = True

    class Config(Options):
        threshold: float = Field(
            default=0.95, ge=0.0, lt=1.0, description="Least probability of the average's class; the rest counts 0."
        )

    config: Config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        sure_B, class_B = teacher_BC.softmax(dim=-1).max(dim=-1)
        counts_B = (sure_B >= self.config.threshold) & (labels.classes_B < 0)
        # As Labels.mean: divided by how many a batch of this size has on average, so that its parts add up.
        unlabeled = len(student_BC) * (1.0 - labels.labeled)
        losses_B = F.cross_entropy(student_BC, class_B, reduction="none") * counts_B
        return losses_B.sum() / max(unlabeled, torch.finfo(torch.float32).tiny)
