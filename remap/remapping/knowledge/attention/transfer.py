"""Attention distillation. B batch, H heads, S the shared tokens {class, patches} of the student's grid."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from remap.errors import BackboneError
from remap.remapping.alignment import Interpolation, pair_blocks, resize_attention, to_shared_tokens
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Pair
from remap.remapping.signals import Attention, Needs, Signals, float32_region
from remap.tuning.base import Options

# Added to every probability of both maps before the logarithm. A hard clamp at the same value would cut the gradient
# of exactly those entries that the student must raise; adding keeps it, and keeps the divergence >= 0.
FLOOR = 1e-6


class AttentionTransfer(LossTerm):
    """Li et al. 2024, arXiv 2411.09702, "attention distillation": the student's maps follow the teacher's.

    KL(teacher || student) of each row (query), mean over rows, heads, images and block pairs. The paper uses
    cross-entropy, which has the same gradient; KL is zero where the maps agree. Both maps are softmax rows over the
    tokens that both networks have: prompts and registers are cut, and the class token too if one side lacks it.
    The teacher's map is brought to the student's grid.
    """

    class Config(Options):
        """Options.

        layers: Pairs of blocks: "last", "uniform" or [[student, teacher], ...] counted from 0.
        heads: "mean" compares maps averaged over heads; "each" compares head by head, as the paper does.
        resize: How a teacher's map is carried to another patch grid.
        """

        layers: Literal["last", "uniform"] | tuple[tuple[int, int], ...] = "last"
        heads: Literal["mean", "each"] = "mean"
        resize: Interpolation = "bilinear"

    config: Config

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        student, teacher = pair.student, pair.known_teacher("attention")
        if config.heads == "each" and student.heads != teacher.heads:
            raise BackboneError(
                "heads: each compares head by head and needs equally many heads on both sides",
                given=f"student {student.heads}, teacher {teacher.heads}",
                do="use heads: mean",
            )
        self.keep_class_token = student.has_class_token and teacher.has_class_token
        self.blocks = pair_blocks(config.layers, student.depth, teacher.depth)

    def student_needs(self) -> Needs:
        return Needs(attention=frozenset(student for student, _ in self.blocks))

    def teacher_needs(self) -> Needs:
        return Needs(attention=frozenset(teacher for _, teacher in self.blocks))

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        """One map a teacher block on the student's grid: (B, S, S), or (B, H, S, S) for ``heads: each``."""
        grid = self.pair.student.grid
        maps = {}
        for index in sorted(self.teacher_needs().attention):
            attention = teacher.attention[index]
            # The mean over heads comes first: it is what makes the resized and cached map small.
            map_xSS = self._map(attention)
            resized = resize_attention(map_xSS, attention.grid, grid, self.keep_class_token, self.config.resize)
            maps[self._item(index)] = resized
        return maps

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        # Blocks named in several pairs are computed once.
        maps = {index: self._map(student.attention[index]) for index in self.student_needs().attention}
        losses = [row_kl(maps[s], target[self._item(t)]) for s, t in self.blocks]
        return torch.stack(losses).mean()

    def _item(self, teacher_block: int) -> str:
        height, width = self.pair.student.grid
        tokens = "class+patches" if self.keep_class_token else "patches"
        return f"map{teacher_block} {height}x{width} {self.config.resize} {tokens} heads={self.config.heads}"

    def _map(self, attention: Attention) -> Tensor:
        map_BHSS = to_shared_tokens(attention, self.keep_class_token).map_BHSS()
        return map_BHSS.mean(dim=1) if self.config.heads == "mean" else map_BHSS


def row_kl(student_xSS: Tensor, teacher_xSS: Tensor) -> Tensor:
    """KL(teacher || student) of each row in float32, mean over all rows; ``FLOOR`` mixed into both."""
    rows = student_xSS.numel() // student_xSS.shape[-1]
    with float32_region(student_xSS):
        log_student = _floored(student_xSS).log()
        return F.kl_div(log_student, _floored(teacher_xSS), reduction="sum") / rows


def _floored(map_xSS: Tensor) -> Tensor:
    """Rows that still sum to 1, with no entry below about ``FLOOR``."""
    return (map_xSS.float() + FLOOR) / (1.0 + FLOOR * map_xSS.shape[-1])
