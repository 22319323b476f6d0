"""Attention distillation on whole maps. B batch, H heads, S the tokens {class, patches} of the student's grid."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.remapping.knowledge.attention.block_term import BlockTerm, RowTerm, log_mean
from remap.remapping.objective import Pair
from remap.remapping.signals import Attention


class _WholeMap(BlockTerm):
    """Every query against every key, averaged over heads or head by head."""

    class Config(BlockTerm.Config):
        heads: Literal["mean", "each"] = Field(
            default="mean", description="Compare the mean over heads, or each head (as in the paper)."
        )

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        if config.heads == "each":
            self.require_equal_heads("mean")

    def details(self) -> tuple[str, ...]:
        return (f"heads={self.config.heads}",)


class AttentionTransfer(_WholeMap, RowTerm):
    """Li et al. 2024, arXiv 2411.09702, "attention distillation": the student's maps follow the teacher's.

    KL(teacher || student) of each row (query), mean over rows, heads, images and block pairs. The paper uses
    cross-entropy, which has the same gradient; KL is zero where the maps agree. The authors' code sums over block
    pairs instead: their weight 3 over 18 blocks is a weight of 54 here. Both maps are softmax rows over the
    tokens that both networks have. One item a teacher block: (B, S, S), or (B, H, S, S) for ``heads: each``.
    """

    name = "attention"

    def read(self, attention: Attention, grid: tuple[int, int]) -> dict[str, Tensor]:
        log_xSS = attention.scores_BHSS().log_softmax(dim=-1)
        if self.config.heads == "mean":  # before the resize: it makes the resized and cached map small
            log_xSS = log_mean(log_xSS)
        if grid != attention.grid:
            log_xSS = self.resize(attention, grid).attention(log_xSS.exp()).log()
        return {"map": log_xSS}


class AttentionScoresMatch(_WholeMap):
    """Jiao et al. 2020 (TinyBERT), arXiv 1909.10351: mean squared error of the scores before the softmax.

    Scores are q k^T / sqrt(h) with the position bias of models that have one, over the tokens that both networks
    have. One item a teacher block: (B, S, S), or (B, H, S, S) for ``heads: each``.
    """

    name = "attention_scores"

    def read(self, attention: Attention, grid: tuple[int, int]) -> dict[str, Tensor]:
        scores_xSS = attention.scores_BHSS()
        if self.config.heads == "mean":
            scores_xSS = scores_xSS.mean(dim=1)
        return {"scores": self.resize(attention, grid).scores(scores_xSS)}

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher.float())
