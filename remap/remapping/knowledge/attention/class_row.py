"""Attention distillation on the class token's row. B batch, H heads, S the tokens {class, patches}."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from remap.errors import BackboneError
from remap.remapping.alignment import Interpolation, class_row, resize_rows
from remap.remapping.knowledge.attention.block_term import BlockTerm, floored, row_kl
from remap.remapping.objective import Pair
from remap.remapping.signals import Attention


class ClassRow(BlockTerm):
    """Wang et al. 2022 (AttnDistill), arXiv 2210.00944: where the student's class token looks follows the teacher's.

    KL(teacher || student) of the class token's row, mean over images and block pairs. On another grid the patch part
    of the teacher's row is resized as an image and keeps its mass, and the class weight stays what it was (head by
    head, unless heads are averaged). ``product`` is the paper's way to compare any numbers of heads: softmax of the
    sum over heads of log-probabilities, divided by a temperature. Only this one row is ever computed, not the map.
    One item a teacher block: (B, S), or (B, H, S) for ``heads: each``.
    """

    class Config(BlockTerm.Config):
        """Options."""

        heads: Literal["product", "mean", "each"] = Field(
            default="product", description="Combine heads by product or mean of probabilities, or compare each."
        )
        temperature: float | None = Field(
            default=None, gt=0.0, description="Divides log-probabilities; null is 10 for product, else 1."
        )
        resize: Interpolation = Field(default="bicubic", description="Interpolation between the two patch grids.")

    config: Config
    name = "attention_cls"

    def __init__(self, pair: Pair, config: Config) -> None:
        super().__init__(pair, config)
        if not self.keep_class_token:
            sides = {"student": pair.student, "teacher": pair.known_teacher(self.name)}
            without = [side for side, anatomy in sides.items() if not anatomy.has_class_token]
            raise BackboneError(
                "attention_cls compares the class tokens' rows, and needs a class token on both sides",
                given=f"no class token: {' and '.join(without)}",
                do="compare patches: attention or relations between transformers, tokens or gram with any network",
            )
        if config.heads == "each":
            self.require_equal_heads("product or heads: mean")
        self.temperature = config.temperature or (10.0 if config.heads == "product" else 1.0)

    def details(self) -> tuple[str, ...]:
        return (f"heads={self.config.heads}", f"T={self.temperature:g}")

    def read(self, attention: Attention, grid: tuple[int, int]) -> dict[str, Tensor]:
        row_xS = class_row(attention).map_BHSS().squeeze(2)
        if self.config.heads == "mean":
            row_xS = row_xS.mean(dim=1)
        row_xS = resize_rows(row_xS, attention.grid, grid, True, self.config.resize)
        if self.config.heads == "product":
            # The floor keeps the logarithm finite: sharp heads and resized rows hold zeros.
            return {"class_row": (floored(row_xS).log().sum(dim=1) / self.temperature).softmax(dim=-1)}
        if self.temperature != 1.0:
            row_xS = (floored(row_xS).log() / self.temperature).softmax(dim=-1)
        return {"class_row": row_xS}

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return row_kl(student, teacher)
