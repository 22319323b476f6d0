"""Contrast of student and teacher. B batch, E width of the common embedding."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.remapping.knowledge.features.terms import PooledTerm
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.tuning.base import Options


class ContrastiveRepresentation(PooledTerm):
    """After Tian et al. 2020 (CRD), arXiv 1910.10699: of all images, the student knows the teacher's view of this one.

    Both pooled features go through a linear map of their own to ``width`` numbers of length 1; both maps are trained
    and dropped afterwards. Cross-entropy of an image's pair against its negatives (InfoNCE) with cosines over
    ``temperature``, once from the student's side and once from the teacher's, the two added; mean over images.

    It differs from the paper in two ways. The paper draws thousands of negatives from a memory of the whole training
    set; here they are the other images of the batch, so it wants large batches. And the paper estimates the ratio of
    densities by a binary critic with a constant for the size of the data, which needs such a memory.

    Images of the same class are not negatives where both labels are known (the paper's choice with labels); a mixed
    image counts by its larger share. Without labels every other image is one.
    """

    class Config(Options):
        width: int = Field(default=128, ge=1, description="Width of the space in which features are compared.")
        temperature: float = Field(default=0.07, gt=0.0, description="Temperature; divides the cosines.")

    config: Config
    name = "crd"

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        self.student_map, self.teacher_map = (nn.Linear(width, config.width) for width in self.widths)

    def compare(self, ours_BD: Tensor, theirs_BD: Tensor, labels: Labels) -> Tensor:
        ours_BE = F.normalize(self.student_map(ours_BD), dim=1)
        theirs_BE = F.normalize(self.teacher_map(theirs_BD), dim=1)
        scores_BB = ours_BE @ theirs_BE.mT / self.config.temperature
        scores_BB = scores_BB.masked_fill(_same_class(labels), float("-inf"))
        own = torch.arange(len(scores_BB), device=scores_BB.device)
        return F.cross_entropy(scores_BB, own) + F.cross_entropy(scores_BB.mT, own)


def _same_class(labels: Labels) -> Tensor:
    """Return pairs (B, B) of different images that are known to be of one class."""
    known_BB = labels.known_B[:, None] & labels.known_B[None, :]
    same_BB = known_BB & (labels.main_B[:, None] == labels.main_B[None, :])
    return same_BB & ~torch.eye(len(same_BB), dtype=torch.bool, device=same_BB.device)
