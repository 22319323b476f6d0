"""TaskRes (Yu et al. 2023, arXiv 2211.10277): a learned residual of the words' features.

Letters: C classes, E dimensions that images and texts share.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.tuning.base import Attachment, Method, Options
from remap.tuning.words import WordHead, attach_words, zero_shot


class TaskRes(Method):
    """t' = w + alpha x, equation 4, with w the zero-shot unit feature of a class and x its residual: C*E parameters."""

    class Config(Options):
        alpha: float = Field(default=0.5, gt=0.0, description="Scale of the residual.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        return attach_words(model, anatomy, Residual(model, anatomy, self.config.alpha))


class Residual(WordHead):
    """The residual, 0 at first."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, alpha: float) -> None:
        super().__init__(model, anatomy, "taskres")
        self.alpha = alpha
        self.residual = nn.Parameter(torch.zeros(self.head.out_features, self.head.in_features))

    def texts(self) -> Tensor:
        return zero_shot(self.language, self.residual) + self.alpha * self.residual
