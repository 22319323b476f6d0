"""Distillation on three levels: images, pairs of images, pairs of classes. B batch, C classes; all in float32."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from remap.remapping.knowledge.logits.distillation import LogitsTerm, kl_at_temperature
from remap.remapping.labels import Labels
from remap.remapping.signals import float32_region
from remap.tuning.base import Options


class MultiLevelDistillation(LogitsTerm):
    """Jin et al. 2023, "Multi-Level Logit Distillation", CVPR, pages 24276-24285.

    With P = softmax(logits / T) of shape (B, C), for each of several temperatures: KL times T^2 (instance),
    ||P_t P_t' - P_s P_s'||^2 / B (batch: which images are answered alike) and ||P_t' P_t - P_s' P_s||^2 / C (class:
    which classes are answered together); weighted, added, and averaged over the temperatures.

    Different from the authors' training: they add up the five temperatures, so their weight is a fifth of ours, and
    they use a weak and a strong view of each image in one step, we the one view of the step. Their masks of the images
    and classes that the teacher is less confident of than the median are left out: in the released code they multiply a
    loss that is averaged already, and so do no more than halve it. No label is needed; the class level takes C * C
    numbers.
    """

    class Config(Options):
        temperatures: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
            default=(2.0, 3.0, 4.0, 5.0, 6.0), min_length=1, description="Temperatures that the loss is averaged over."
        )
        instance: float = Field(default=1.0, ge=0.0, description="Weight of the divergence per image.")
        batch: float = Field(default=1.0, ge=0.0, description="Weight of the Gram matrix of images.")
        classes: float = Field(default=1.0, ge=0.0, description="Weight of the Gram matrix of classes.")

    config: Config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        with float32_region(student_BC):
            losses = [self._at(student_BC, teacher_BC, temperature) for temperature in self.config.temperatures]
        return torch.stack(losses).mean()

    def _at(self, student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
        batch, classes = student_BC.shape
        s_BC, t_BC = (student_BC / temperature).softmax(dim=1), (teacher_BC / temperature).softmax(dim=1)
        instance = kl_at_temperature(student_BC, teacher_BC, temperature)
        of_batch = (t_BC @ t_BC.mT - s_BC @ s_BC.mT).square().sum() / batch
        of_classes = (t_BC.mT @ t_BC - s_BC.mT @ s_BC).square().sum() / classes
        return self.config.instance * instance + self.config.batch * of_batch + self.config.classes * of_classes
