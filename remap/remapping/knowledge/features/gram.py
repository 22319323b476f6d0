"""Relations of tokens within an image. B batch, N patches of the student's grid."""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.remapping.knowledge.features.terms import Layers, TokenTerm, token_pairs
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals, float32_region
from remap.tuning.base import Options


class TokenGram(TokenTerm):
    """How alike the patches of an image are to each other: cosines of all pairs of tokens, in student and teacher.

    Free of widths, heads and rotations of the features, and without parameters. "kl" is LightlyTrain's local loss:
    KL(teacher || student) of each row's softmax(cosine / temperature), mean over rows and images. "mse" is the
    within-image part of Hao et al. 2022, arXiv 2107.01378: squared difference of cosines, mean over pairs and images.
    The teacher's tokens are brought to the student's grid first (LightlyTrain resizes the student's).
    """

    class Config(Options):
        layers: Layers = Field(
            default="last", description='Block pairs: "last" (final norm), "uniform" or [[student, teacher], ...].'
        )
        loss: Literal["kl", "mse"] = Field(default="kl", description='"kl" of softmax rows, or "mse" of cosines.')
        temperature: float = Field(default=0.07, gt=0.0, description='Temperature of "kl"; divides the cosines.')

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config, token_pairs(config.layers, pair, "gram"))

    @classmethod
    def temperatures_of(cls, config: Options) -> dict[str, Any]:
        return {} if cast(TokenGram.Config, config).loss == "mse" else super().temperatures_of(config)

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        """Return cosines (B, N, N): smaller than the tokens wherever a teacher is wider than the grid has patches."""
        return {self.item(s, t): cosines(self.resized(teacher, s, t)) for s, t in self.blocks}

    def item(self, student_block: int, teacher_block: int) -> str:
        return f"cosines{teacher_block}{self.grid_suffix(student_block, teacher_block)}"

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        losses = []
        for s, t in self.blocks:
            ours_BNN, theirs_BNN = cosines(student.tokens[s].patches_BND), target[self.item(s, t)].float()
            if self.config.loss == "mse":
                losses.append(F.mse_loss(ours_BNN, theirs_BNN))
                continue
            ours, theirs = ((one / self.config.temperature).log_softmax(dim=-1) for one in (ours_BNN, theirs_BNN))
            rows = ours.shape[0] * ours.shape[1]
            losses.append(F.kl_div(ours, theirs, reduction="sum", log_target=True) / rows)
        return torch.stack(losses).mean()


def cosines(tokens_BND: Tensor) -> Tensor:
    """Return cosines of all pairs of tokens of an image (B, N, N), float32."""
    with float32_region(tokens_BND):
        unit_BND = F.normalize(tokens_BND.float(), dim=-1)
        return unit_BND @ unit_BND.mT
