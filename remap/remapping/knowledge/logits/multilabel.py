"""``ce`` and ``kd`` where an image has any number of classes: each class is a question of its own, yes or no.

B batch, C classes; all in float32. Both are means over classes and images, so that their weights compare.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from remap.remapping.knowledge.logits.distillation import CrossEntropy as OfOneClass
from remap.remapping.knowledge.logits.distillation import KnowledgeDistillation, LogitsTerm, answer_to_labels
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm
from remap.remapping.signals import Signals


class BinaryCrossEntropy(LossTerm):
    """-[w y log sigmoid(s) + (1 - y) log sigmoid(-s)], mean over classes, then over the labelled images.

    ``label_smoothing`` e makes y (1 - e) + e / 2 of y, as for two classes; a mixed image has the mixed y. w is what a
    yes counts (``train.class_weight_power``), else 1.
    """

    Config = OfOneClass.Config
    config: OfOneClass.Config
    uses_teacher = False
    classifier = "labels"

    def forward(self, student: Signals, target: Any, labels: Labels) -> Tensor:
        logits_BC = answer_to_labels(student).float()
        smoothing = self.config.label_smoothing
        wanted_BC = labels.probabilities_BC(logits_BC.shape[1]) * (1.0 - smoothing) + smoothing / 2
        losses_BC = F.binary_cross_entropy_with_logits(
            logits_BC, wanted_BC, pos_weight=labels.weights_C, reduction="none"
        )
        return labels.mean(losses_BC.mean(dim=1))


class BernoulliDistillation(LogitsTerm):
    """KL(sigmoid(t/T) || sigmoid(s/T)) of each class as a yes or no, times T^2; mean over classes and images.

    The decomposition into questions of one class against the rest is that of Yang et al. 2023 (ICCV, arXiv 2308.06453,
    "multi-label logits distillation"), with the temperature of Hinton et al. 2015.
    """

    Config = KnowledgeDistillation.Config
    config: KnowledgeDistillation.Config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        return bernoulli_kl(student_BC, teacher_BC, self.config.temperature)


def bernoulli_kl(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of the softened Bernoulli distributions, mean over all, times T^2."""
    student, teacher = student_BC / temperature, teacher_BC / temperature
    yes, no = (
        teacher.mul(sign).sigmoid() * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student)) for sign in (1, -1)
    )
    return (yes + no).mean() * temperature**2
