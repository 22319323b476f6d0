"""Distillation of relations between tokens.

B batch, H heads, h head width, S the shared tokens {class, patches}, D = H h the attention width, R relation heads.
"""

from math import gcd
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.remapping.knowledge.attention.block_term import BlockTerm, heads_of
from remap.remapping.objective import Pair
from remap.remapping.signals import Attention, Needs, float32_region


class Relations(BlockTerm):
    """Wang et al. 2021 (MiniLMv2), arXiv 2012.15828; on images Ren et al. 2023 (TinyMIM), arXiv 2301.01296.

    Queries of all heads are put side by side and split anew into R relation heads, the same number on both sides, so
    that any numbers of heads and any widths can be compared; then KL(teacher || student) of the rows of
    softmax(X X^T / sqrt(d_r)), d_r = D / R, and likewise for keys and values. Mean over rows, relation heads, images,
    relations and block pairs.

    Queries and keys are those that attention uses: behind their norms and rotations, and queries without the scale
    1/sqrt(h) that our signal carries, h being their last dimension. A position bias is not part of them.
    On another grid the teacher's vectors are resized, each channel as an image and the class token kept, before
    relations are formed. One item a relation and teacher block: (B, S, D).
    With a teacher much deeper than the student a block of its upper middle teaches better than its last (MiniLMv2
    takes 21 of 24 for BERT-large, TinyMIM 18 of 24 for ViT-L): name the pair, ``layers: [[-1, 17]]``.
    """

    class Config(BlockTerm.Config):
        relations: tuple[Literal["q", "k", "v"], ...] = Field(
            default=("q", "k", "v"), description="Projections to compare."
        )
        relation_heads: int | None = Field(
            default=None,
            ge=1,
            description="Relation heads; null is the largest divisor of both widths up to the teacher's heads.",
        )

    config: Config
    name = "relations"

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        if not config.relations or len(set(config.relations)) < len(config.relations):
            raise BackboneError(
                "relations must name each of q, k and v once at most, and one at least",
                given=list(config.relations),
                allowed="q, k, v",
            )
        heads = {self._heads(s, t) for s, t in self.blocks}
        if len(heads) > 1:
            raise BackboneError(
                "the blocks of these pairs have different attention widths, which need different relation heads",
                given=sorted(heads),
                do="name one number that divides all widths (relation_heads), or fewer pairs (layers)",
            )
        (self.heads,) = heads

    def _heads(self, student_block: int, teacher_block: int) -> int:
        student, teacher = self.pair.student, self.pair.known_teacher(self.name)
        widths = attention_width(student, student_block), attention_width(teacher, teacher_block)
        common = gcd(*widths)
        if self.config.relation_heads is None:
            most = heads_of(teacher, teacher_block)
            return max((number for number in range(1, most + 1) if common % number == 0), default=1)
        if common % self.config.relation_heads:
            raise BackboneError(
                "relation_heads must divide the attention widths of both networks",
                given=f"{self.config.relation_heads}; widths: student {widths[0]}, teacher {widths[1]}",
                allowed=f"divisors of {common}",
            )
        return self.config.relation_heads

    def reads(self, blocks: frozenset[int]) -> Needs:
        return Needs(attention=blocks, values=blocks if "v" in self.config.relations else frozenset())

    def read(self, attention: Attention, grid: tuple[int, int]) -> dict[str, Tensor]:
        scale = attention.q_BHSh.shape[-1] ** 0.5
        of = {"q": (attention.q_BHSh, scale), "k": (attention.k_BHSh, 1.0), "v": (attention.v_BHSh, 1.0)}
        found: dict[str, Tensor] = {}
        for what in self.config.relations:
            x_BHSh, factor = of[what]
            assert x_BHSh is not None, "the tap does not record values"
            x_BSD = x_BHSh.float().transpose(1, 2).flatten(2) * factor
            found[what] = self.resize(attention, grid).tokens(x_BSD)
        return found

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            log_teacher = log_relations(teacher, self.heads)
        log_student = log_relations(student, self.heads)
        rows = log_student.numel() // log_student.shape[-1]
        return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) / rows


def attention_width(anatomy: Anatomy, block: int) -> int:
    """Return channels of a block's queries over all heads; 0 where it has no attention (the tap refuses those)."""
    return heads_of(anatomy, block) * getattr(anatomy.blocks[block], "head_dim", 0)


def log_relations(x_BSD: Tensor, heads: int) -> Tensor:
    """Return log softmax(X X^T / sqrt(d_r)) of each relation head, (B, R, S, S), in float32."""
    with float32_region(x_BSD):
        x_BRSd = x_BSD.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        return (x_BRSd @ x_BRSd.mT * x_BRSd.shape[-1] ** -0.5).log_softmax(dim=-1)
