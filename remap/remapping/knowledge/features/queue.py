"""Similarity to a queue of the teacher's features. B batch, D the teacher's width, K entries of the queue."""

from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.remapping.knowledge.features.terms import PooledTerm, ProjectorOptions, projector
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.tuning.base import Options


class SimilarityToQueue(PooledTerm):
    """Fang et al. 2021 (SEED), arXiv 2101.04731, Eq. 2 to 5: an image is similar to the same ones for both networks.

    p = softmax(z . d_k / temperature) over the normalised teacher features d_k of a first-in first-out queue, whose
    last entries are those of this batch; z is the teacher's feature of the image, or the student's through the
    projector. KL(p_teacher || p_student), mean over images: SEED's cross-entropy minus the teacher's entropy, which has
    no gradient. Temperatures are the paper's; its queue of 65,536 is for a million images.

    The queue follows updates, not passes, and is part of a checkpoint.
    """

    class Config(ProjectorOptions):
        size: int = Field(default=4096, ge=1, description="Features in the queue.")
        temperature: float = Field(default=0.2, gt=0.0, description="Temperature of the student's similarities.")
        teacher_temperature: float = Field(default=0.01, gt=0.0, description="Temperature of the teacher's.")

    config: Config
    name = "queue"
    queue_KD: Tensor
    filled: Tensor

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        self.projector = projector(config, *self.widths)
        self.register_buffer("queue_KD", torch.zeros(config.size, self.widths[1]))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._batch_BD: Tensor | None = None

    @classmethod
    def temperatures_of(cls, config: Options) -> dict[str, Any]:
        teacher = cast(SimilarityToQueue.Config, config).teacher_temperature
        return super().temperatures_of(config) | {"teacher_temperature": teacher}

    def compare(self, ours_BD: Tensor, theirs_BD: Tensor, labels: Labels) -> Tensor:
        theirs_BD = F.normalize(theirs_BD, dim=1)
        ours_BD = F.normalize(self.projector(ours_BD), dim=1)
        # The batch's features replace the oldest ones, or places that nothing was put in yet.
        queue_KD = self._with(theirs_BD)
        used_K = torch.arange(len(queue_KD), 0, -1, device=queue_KD.device) <= self.filled + len(theirs_BD)
        temperatures = ((ours_BD, self.config.temperature), (theirs_BD, self.config.teacher_temperature))
        ours, theirs = (
            (z_BD @ queue_KD.mT / temperature).masked_fill(~used_K, float("-inf")).log_softmax(dim=1)
            for z_BD, temperature in temperatures
        )
        self._batch_BD = theirs_BD
        # Both logarithms of an unused place become 0: it has no part in the divergence.
        ours, theirs = (x_BK.masked_fill(~used_K, 0.0) for x_BK in (ours, theirs))
        return (theirs.exp() * used_K * (theirs - ours)).sum(dim=1).mean()

    @torch.no_grad()
    def after_step(self) -> None:
        if self._batch_BD is not None:
            self.queue_KD.copy_(self._with(self._batch_BD))
            self.filled.add_(len(self._batch_BD)).clamp_(max=len(self.queue_KD))
            self._batch_BD = None

    def _with(self, batch_BD: Tensor) -> Tensor:
        """Return the queue with a batch at its end (K, D)."""
        return torch.cat([self.queue_KD, batch_BD])[-len(self.queue_KD) :]
