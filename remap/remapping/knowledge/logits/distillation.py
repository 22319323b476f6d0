"""Losses on labels and logits as they are. B batch, C classes; all in float32."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from remap.errors import BackboneError
from remap.registry import LATER
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Pair
from remap.remapping.signals import Signals
from remap.remapping.targets import LOGITS, logits_of
from remap.tuning.base import Options


def answer_to_labels(student: Signals) -> Tensor:
    """Return the student's logits that labels are compared with.

    Those of the class token, if a distillation token has its own (Touvron et al. 2021, DeiT, arXiv 2012.12877) and
    learns from a teacher (``Objective`` sees to that).
    """
    return student.head_logits[0] if student.head_logits else student.logits_BC


def answer_to_teacher(student: Signals) -> Tensor:
    """Return the student's logits that the teacher's are compared with: the distillation token's, if there is one."""
    return student.head_logits[-1] if student.head_logits else student.logits_BC


class CrossEntropy(LossTerm):
    """Cross-entropy with the labels, mean over the labelled images; a mixed label is a mixed distribution."""

    class Config(Options):
        label_smoothing: float = Field(
            default=0.0, ge=0.0, lt=1.0, description="Share of the label spread over all classes."
        )
        first_class: Annotated[int, LATER] = Field(
            default=0,
            ge=0,
            description="Compare among classes from this one on; the teacher's answers hold those before.",
        )

    config: Config
    uses_teacher = False
    classifier = "labels"

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        if config.first_class and config.first_class >= pair.num_classes:
            raise BackboneError(
                "losses.ce.first_class leaves no class to compare among",
                given=config.first_class,
                allowed=f"0 to {pair.num_classes - 1}",
            )

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        logits_BC = answer_to_labels(student).float()
        wanted = labels.main_B if labels.other_B is None else labels.probabilities_BC(logits_BC.shape[1])
        weights_C, smoothing = labels.weights_C, self.config.label_smoothing
        if first := self.config.first_class:
            logits_BC = logits_BC[:, first:]
            weights_C = None if weights_C is None else weights_C[first:]
            # What images say of classes before is left to the teacher: they count 0 (cross_entropy's ignore_index).
            if wanted.ndim == 1:
                wanted = torch.where(wanted < first, -100, wanted - first)
            else:  # smoothed here: cross_entropy would also smooth what says nothing of these classes
                wanted = wanted[:, first:]
                known_B1 = wanted.sum(dim=1, keepdim=True)
                wanted, smoothing = (1.0 - smoothing) * wanted + smoothing * known_B1 / wanted.shape[1], 0.0
        # Divided by the number of images, not by their weights: the parts of a batch add up.
        losses_B = F.cross_entropy(logits_BC, wanted, weights_C, reduction="none", label_smoothing=smoothing)
        return labels.mean(losses_B)


class LogitsTerm(LossTerm):
    """A term that compares the answers of both networks, and keeps the teacher's logits for it.

    A teacher that knows the first classes only, as a run that is extended, is compared on those (learning without
    forgetting, Li and Hoiem 2016, arXiv 1606.09282).
    """

    classifier = "teacher"

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        return logits_of(teacher)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        teacher_BC = target[LOGITS].float()
        return self.compare(answer_to_teacher(student).float()[:, : teacher_BC.shape[1]], teacher_BC, labels)

    @abstractmethod
    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        """Return the loss between float32 logits, a scalar."""


class KnowledgeDistillation(LogitsTerm):
    """Hinton et al. 2015, arXiv 1503.02531: KL(softmax(t/T) || softmax(s/T)) * T^2, sum over classes, mean over images.

    The factor T^2 keeps the size of the gradient about equal for any temperature, so that the weight of the term
    and its temperature can be chosen apart. Other tools scale the same divergence differently; ``scale`` gives the
    number each of them computes, so that a weight found with one can be taken over:

    ============  ===========================  =======  ==========================================================
    scale         reduction                    times    who
    ============  ===========================  =======  ==========================================================
    remap         sum over C, mean over B      T^2      this project
    timm          sum over C, mean over B      T^2      timm's distillation tasks; torchdistill's KDLoss when it
                                                        has targets and alpha > 0 (its beta is the weight)
    torchdistill  sum over C, mean over B      1        torchdistill's KDLoss with alpha 0 or without targets:
                                                        neither T^2 nor beta is applied
    deit          mean over B * C              T^2      DeiT's soft distillation: C times smaller
    torchtune     cross-entropy with the       -        torchtune's ForwardKLLoss: the divergence plus the teacher's
                  teacher, mean over B                  entropy (same gradient); it has no temperature, so T is 1
    ============  ===========================  =======  ==========================================================
    """

    class Config(Options):
        temperature: float = Field(default=4.0, gt=0.0, description="Temperature; divides the logits of both networks.")
        scale: Literal["remap", "timm", "deit", "torchdistill", "torchtune"] = Field(
            default="remap",
            description="Scaling of the KL term; pick another tool's to reuse loss weights tuned there.",
        )

        @model_validator(mode="after")
        def _torchtune_has_no_temperature(self) -> Self:
            if self.scale == "torchtune" and self.temperature != 1.0:
                raise ValueError(f"scale torchtune has no temperature; set it to 1 instead of {self.temperature:g}")
            return self

    config: Config

    @classmethod
    def temperatures_of(cls, config: Options) -> dict[str, Any]:
        return (
            {} if cast(KnowledgeDistillation.Config, config).scale == "torchtune" else super().temperatures_of(config)
        )

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        temperature, scale = self.config.temperature, self.config.scale
        if scale == "torchtune":
            return cross_entropy_with(student_BC, teacher_BC)
        loss = kl_at_temperature(student_BC, teacher_BC, temperature)
        if scale == "deit":
            return loss / student_BC.shape[1]
        return loss / temperature**2 if scale == "torchdistill" else loss


class HardDistillation(LogitsTerm):
    """Touvron et al. 2021, DeiT, arXiv 2012.12877: cross-entropy with the teacher's most likely class.

    The class is that of the image as both networks see it, so a mixed image is not a special case, and no label is
    needed. In the paper the label's cross-entropy and this one have a weight of 1/2 each, and this one no smoothing.
    """

    class Config(Options):
        label_smoothing: float = Field(
            default=0.0, ge=0.0, lt=1.0, description="Share of the teacher's class spread over all classes."
        )

    config: Config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        smoothing = self.config.label_smoothing
        return F.cross_entropy(student_BC, teacher_BC.argmax(dim=1), label_smoothing=smoothing)


def kl_at_temperature(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of the softened distributions, batch mean, times ``temperature`` squared."""
    log_student, log_teacher = (F.log_softmax(x_BC.float() / temperature, dim=-1) for x_BC in (student_BC, teacher_BC))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def cross_entropy_with(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Return the cross-entropy of softmax(student) with softmax(teacher), mean over rows."""
    return F.cross_entropy(student_BC, teacher_BC.softmax(dim=-1))
