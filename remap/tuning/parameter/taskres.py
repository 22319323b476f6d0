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
    """t' = t + alpha x, equation 4, with t the zero-shot feature of a class and x its residual: C*E parameters.

    t is not normalised, as in the authors' code: it has the length of the class's first text.
    """

    class Config(Options):
        alpha: float = Field(default=0.5, gt=0.0, description="Scale of the residual.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        return attach_words(model, anatomy, Residual(model, anatomy, self.config.alpha))


class Residual(WordHead):
    """The residual, 0 at first."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, alpha: float) -> None:
        super().__init__(model, anatomy, "taskres")
        self.alpha, firsts = alpha, [several[0] for several in self.language.texts]
        # No buffer: a task, which does not know the texts, has the classifier.
        features_CE = self.language.features(firsts, unit=False) if firsts else torch.empty(0, 1)
        self.lengths_C1 = features_CE.norm(dim=-1, keepdim=True)
        self.residual = nn.Parameter(torch.zeros(self.head.out_features, self.head.in_features))

    def texts(self) -> Tensor:
        zero_shot_CE = self.lengths_C1.to(self.residual) * zero_shot(self.language, self.residual)
        return zero_shot_CE + self.alpha * self.residual
