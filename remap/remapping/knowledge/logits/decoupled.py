"""Distillation taken apart into the class of the image and all others. B batch, C classes; all in float32.

Both losses want one class an image. Of a mixed image (mixup, CutMix) it is the class with the larger share; of an
image without a label, or of a class that the teacher does not know (a run that is extended), the teacher's most likely
one. So every image of a batch counts.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.remapping.knowledge.logits.distillation import LogitsTerm, kl_at_temperature
from remap.remapping.labels import Labels
from remap.tuning.base import Options


class DecoupledDistillation(LogitsTerm):
    """Zhao et al. 2022, arXiv 2203.08679: (``alpha`` * TCKD + ``beta`` * NCKD) * T^2, mean over images.

    TCKD is the KL between the two-way distributions (the class, all others together), NCKD the KL over the other
    classes alone, made to sum to 1. ``alpha`` = 1 and ``beta`` = the teacher's probability of all other classes would
    be ordinary distillation; a separate ``beta`` does not fade where the teacher is confident.

    Defaults are the authors' for CIFAR-100 (temperature 4, ``beta`` 8); for ImageNet they use temperature 1 and
    ``beta`` 0.5. Their warm-up of the weight over 20 epochs is ``weight_schedule: {warmup_epochs: 20}``. With two
    classes there is one other class, and NCKD is 0.
    """

    class Config(Options):
        alpha: float = Field(default=1.0, ge=0.0, description="Weight of the image's class against all others.")
        beta: float = Field(default=8.0, ge=0.0, description="Weight of the other classes among themselves.")
        temperature: float = Field(default=4.0, gt=0.0, description="Temperature; divides the logits of both networks.")

    config: Config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        temperature = self.config.temperature
        class_B = _known_class(labels, teacher_BC)
        student_BO, teacher_BO = _others(student_BC, class_B), _others(teacher_BC, class_B)
        of_student, of_teacher = (
            # logsumexp of the others' logits is the one logit that stands for all of them.
            torch.stack([_of_class(x_BC, class_B) / temperature, torch.logsumexp(x_BO / temperature, dim=1)], dim=1)
            for x_BC, x_BO in ((student_BC, student_BO), (teacher_BC, teacher_BO))
        )
        of_class = kl_at_temperature(of_student, of_teacher, temperature=1.0) * temperature**2
        of_others = kl_at_temperature(student_BO, teacher_BO, temperature)
        return self.config.alpha * of_class + self.config.beta * of_others


class NormalizedDistillation(LogitsTerm):
    """Yang et al. 2023, arXiv 2303.13005: -t_y log(s_y) + ``gamma`` * T^2 * CE(N(t), N(s)), mean over images.

    t_y and s_y are the probabilities of the image's class at temperature 1, N(.) those of the other classes at
    temperature T, made to sum to 1. The loss of a perfect student is not 0 but the second term's entropy. The authors
    use ``gamma`` 1.5 for convolutional networks and 1 for ViTs, temperature 1, with the labels' cross-entropy.
    """

    class Config(Options):
        gamma: float = Field(default=1.0, ge=0.0, description="Weight of the other classes.")
        temperature: float = Field(default=1.0, gt=0.0, description="Temperature; divides the other classes' logits.")

    config: Config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        temperature = self.config.temperature
        class_B = _known_class(labels, teacher_BC)
        sure_B = _of_class(teacher_BC.softmax(dim=1), class_B)
        of_class = -(sure_B * _of_class(student_BC.log_softmax(dim=1), class_B)).mean()
        wanted_BO = (_others(teacher_BC, class_B) / temperature).softmax(dim=1)
        of_others = F.cross_entropy(_others(student_BC, class_B) / temperature, wanted_BO)
        return of_class + self.config.gamma * temperature**2 * of_others


def _known_class(labels: Labels, teacher_BC: Tensor) -> Tensor:
    """Return one class an image (B,), of those that the teacher knows."""
    likely_B = teacher_BC.argmax(dim=1)
    class_B = labels.main_or(likely_B)
    return torch.where(class_B < teacher_BC.shape[1], class_B, likely_B)


def _of_class(x_BC: Tensor, class_B: Tensor) -> Tensor:
    return x_BC.gather(1, class_B[:, None]).squeeze(1)


def _others(x_BC: Tensor, class_B: Tensor) -> Tensor:
    """Return all columns of a row but one, (B, C - 1). By index: a boolean mask would make a GPU wait."""
    index_O = torch.arange(x_BC.shape[1] - 1, device=x_BC.device)
    return x_BC.gather(1, index_O + (index_O >= class_B[:, None]))
