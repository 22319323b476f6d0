"""Losses on labels and logits. B batch, C classes; all in float32."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.remapping.items import LOGITS, logits_of
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm
from remap.remapping.signals import Signals
from remap.tuning.base import Options


def answer_to_labels(student: Signals) -> Tensor:
    """The student's logits that labels are compared with: those of the class token, if a distillation token has its
    own (Touvron et al. 2021, DeiT, arXiv 2012.12877)."""
    return student.head_logits[0] if student.head_logits else student.logits_BC


def answer_to_teacher(student: Signals) -> Tensor:
    """The student's logits that the teacher's are compared with: those of the distillation token, if there is one."""
    return student.head_logits[-1] if student.head_logits else student.logits_BC


class CrossEntropy(LossTerm):
    """Cross-entropy with the labels, mean over the labelled images; a mixed label is a mixed distribution."""

    class Config(Options):
        label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)

    config: Config
    uses_teacher = False
    uses_labels = True

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        logits_BC = answer_to_labels(student).float()
        wanted = labels.main_B if labels.other_B is None else labels.probabilities_BC(logits_BC.shape[1])
        losses_B = F.cross_entropy(logits_BC, wanted, reduction="none", label_smoothing=self.config.label_smoothing)
        return labels.mean(losses_B)


class KnowledgeDistillation(LossTerm):
    """Hinton et al. 2015, arXiv 1503.02531: KL(softmax(t/T) || softmax(s/T)) * T^2, sum over classes, mean over images.

    The factor T^2 keeps the size of the gradient about equal for any temperature, so that the weight of the term
    and its temperature can be chosen apart.
    """

    class Config(Options):
        temperature: float = Field(default=4.0, gt=0.0)

    config: Config

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        return logits_of(teacher)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        return kl_at_temperature(answer_to_teacher(student), target[LOGITS], self.config.temperature)


def kl_at_temperature(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the softened distributions, batch mean, times ``temperature`` squared."""
    log_student = F.log_softmax(student_BC.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_BC.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
