"""What the losses on attention share. B batch, H heads, S the shared tokens {class, patches}, x leading dimensions."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.remapping.alignment import Interpolation, Resize, pair_blocks, to_shared_tokens
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Pair
from remap.remapping.signals import Attention, Needs, Signals
from remap.tuning.base import Options


class BlockTerm(LossTerm):
    """A loss on the attention of pairs of blocks, mean over the pairs.

    Both networks are compared over the tokens that both have: prompts and registers are cut, and the class token too
    if one side lacks it. What the teacher gives is brought to the student's grid.

    Attributes:
        name: The term's name in the table of losses.
    """

    class Config(Options):
        layers: Literal["last", "uniform"] | tuple[tuple[int, int], ...] = Field(
            default="last", description='Block pairs: "last", "uniform" or [[student, teacher], ...] counted from 0.'
        )
        resize: Interpolation = Field(default="bilinear", description="Interpolation between the two patch grids.")

    config: Config
    name: ClassVar[str]

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        student, teacher = pair.student, pair.known_teacher(self.name)
        self.keep_class_token = student.has_class_token and teacher.has_class_token
        self.blocks = pair_blocks(config.layers, student.depth, teacher.depth)
        if others := sorted({block for block, _ in self.blocks if student.blocks[block].grid != student.grid}):
            raise BackboneError(
                "attention is compared on the grid of the student's last stage",
                given=f"stages {others} of the student, on other grids",
                do="use layers: last, or name stages of that grid",
            )

    def reads(self, blocks: frozenset[int]) -> Needs:
        return Needs(attention=blocks)

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        """Return what ``read`` finds in each of the teacher's blocks, on the student's grid."""
        items: dict[str, Tensor] = {}
        for index in sorted({teacher_block for _, teacher_block in self.blocks}):
            found = self.read(self._shared(teacher, index), self.pair.student.grid)
            items |= {self.item(what, index): value for what, value in found.items()}
        return items

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        losses = []
        # Blocks named in several pairs are read once.
        for index in sorted({student_block for student_block, _ in self.blocks}):
            attention = self._shared(student, index)
            found = self.read(attention, attention.grid)
            losses += [
                self.compare(value, target[self.item(what, teacher_block)])
                for student_block, teacher_block in self.blocks
                if student_block == index
                for what, value in found.items()
            ]
        return torch.stack(losses).mean()

    @abstractmethod
    def read(self, attention: Attention, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return what is compared of one block, by a short name, in float32, carried to ``grid``."""

    def resize(self, attention: Attention, grid: tuple[int, int]) -> Resize:
        """Return how what was read of a block is carried to ``grid``."""
        return Resize(attention.grid, grid, self.keep_class_token, self.config.resize)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss between what ``read`` found on either side, a float32 scalar."""

    def item(self, what: str, teacher_block: int) -> str:
        """Return the name under which a teacher's block is cached: all that its value depends on but the teacher."""
        height, width = self.pair.student.grid
        tokens = "class+patches" if self.keep_class_token else "patches"
        return " ".join((f"{what}{teacher_block}", f"{height}x{width}", self.config.resize, tokens, *self.details()))

    def details(self) -> tuple[str, ...]:
        """Return words of the name for the term's own options."""
        return ()

    def _shared(self, signals: Signals, block: int) -> Attention:
        return to_shared_tokens(signals.attention[block], self.keep_class_token)

    def require_equal_heads(self, instead: str) -> None:
        """Raise a BackboneError where a pair's blocks differ in heads; ``instead`` is what ``heads`` may be."""
        for student_block, teacher_block in self.blocks:
            student = heads_of(self.pair.student, student_block)
            teacher = heads_of(self.pair.known_teacher(self.name), teacher_block)
            if student != teacher:
                raise BackboneError(
                    "heads: each compares head by head and needs equally many heads on both sides",
                    given=f"student {student}, teacher {teacher}",
                    do=f"use heads: {instead}",
                )


def heads_of(anatomy: Anatomy, block: int) -> int:
    """Return heads of one block; 0 where it has no attention (the tap refuses those with a reason)."""
    return getattr(anatomy.blocks[block], "heads", 0)


class RowTerm(BlockTerm):
    """KL(teacher || student) of rows of attention, mean over all rows.

    ``read`` finds log-probabilities: of the student they are never resized, so its gradient is the exact one,
    softmax minus the teacher's row, however sharp the row. The teacher's are cached as probabilities.
    """

    def target(self, teacher: Signals) -> dict[str, Tensor]:
        return {name: log_xS.exp() for name, log_xS in super().target(teacher).items()}

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        rows = student.numel() // student.shape[-1]
        return F.kl_div(student, teacher.float(), reduction="sum") / rows


def log_mean(log_BHx: Tensor) -> Tensor:
    """Return the logarithm of the mean over heads (dimension 1) of probabilities given as logarithms."""
    return log_BHx.logsumexp(dim=1) - math.log(log_BHx.shape[1])
