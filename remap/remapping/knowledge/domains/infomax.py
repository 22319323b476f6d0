"""Information maximisation. B batch, T images without labels, C classes."""

import math
from collections.abc import Mapping

from torch import Tensor

from remap.remapping.knowledge.logits.distillation import answer_to_labels
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm
from remap.remapping.signals import Signals


class InformationMaximization(LossTerm):
    """Liang et al. 2020 (SHOT), arXiv 2002.08546, Eq. 2: entropy of each answer, minus that of the mean answer.

    The first makes outputs confident, the second keeps them from being all the same. It is minus the mutual information
    of image and class, from -log C to 0; the images of a batch should be of all classes.
    """

    uses_teacher = False
    classifier = "labels"
    compares_domains = True

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        logits_BC = answer_to_labels(student).float()
        log_TC = self.chosen(logits_BC, labels).log_softmax(dim=-1)
        if not len(log_TC):
            return 0.0 * logits_BC.sum()
        log_mean_C = log_TC.logsumexp(dim=0) - math.log(len(log_TC))
        entropy = -(log_TC.exp() * log_TC).sum(dim=-1).mean()
        return entropy + (log_mean_C.exp() * log_mean_C).sum()

    def chosen(self, logits_BC: Tensor, labels: Labels) -> Tensor:
        """Return the rows that it reads."""
        return logits_BC[labels.classes_B < 0]
