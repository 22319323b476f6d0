"""Feature distillation. B batch, D width (student and teacher differ)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from remap.errors import BackboneError
from remap.remapping.items import POOLED, pooled_of
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Pair
from remap.remapping.signals import Needs, Signals, float32_region
from remap.tuning.base import Options


class PooledFeature(LossTerm):
    """Miles et al. 2024 (VkD), arXiv 2403.06213: project the student's pooled feature onto the teacher's.

    The pooled feature is what enters the classifier. The teacher's is layer-normed without affine, which takes its
    scale and offset out; the student's goes through the projector only. Matching after pooling and at the end of the
    network is deliberate: tokens of early and late blocks of a wide teacher are more than a narrow student can hold.
    """

    class Config(Options):
        """Options.

        projector: "linear" (no bias), "orthogonal" (keeps distances of the student's features, the paper's choice)
            or "none" for equal widths.
        loss: "smooth_l1" (mean over images and channels, knee at 1) or "cosine" (1 - cosine, mean over images).
        """

        projector: Literal["linear", "orthogonal", "none"] = "linear"
        loss: Literal["smooth_l1", "cosine"] = "smooth_l1"

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        self.projector = _projector(config.projector, pair.student.width, pair.known_teacher("feature").width)

    def student_needs(self) -> Needs:
        return Needs(pooled=True)

    def teacher_needs(self) -> Needs:
        return Needs(pooled=True)

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        return pooled_of(teacher)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        pooled_BD, wanted_BD = _pooled(student), target[POOLED].float()
        wanted_BD = F.layer_norm(wanted_BD, wanted_BD.shape[-1:])
        with float32_region(pooled_BD):
            projected_BD = self.projector(pooled_BD)
            if self.config.loss == "smooth_l1":
                return F.smooth_l1_loss(projected_BD, wanted_BD)
            return (1.0 - F.cosine_similarity(projected_BD, wanted_BD, dim=-1)).mean()


def _pooled(signals: Signals) -> Tensor:
    assert signals.pooled_BD is not None, "the tap was not told to keep pooled features"
    return signals.pooled_BD.float()


def _projector(kind: Literal["linear", "orthogonal", "none"], student_width: int, teacher_width: int) -> nn.Module:
    """A map from the student's width to the teacher's; drawn from the global generator of PyTorch.

    Raises:
        BackboneError: "none" for different widths.
    """
    if kind == "none":
        if student_width != teacher_width:
            raise BackboneError(
                "projector: none needs equal widths",
                given=f"student {student_width}, teacher {teacher_width}",
                allowed="linear, orthogonal",
            )
        return nn.Identity()
    linear = nn.Linear(student_width, teacher_width, bias=False)
    # The Cayley map costs one linear solve; the default for oblong matrices, householder, is several times slower.
    return linear if kind == "linear" else orthogonal(linear, orthogonal_map="cayley")
