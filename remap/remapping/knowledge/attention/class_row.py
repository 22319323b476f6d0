"""Attention distillation on the class token's row. B batch, H heads, S the tokens {class, patches}."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from remap.errors import BackboneError
from remap.remapping.alignment import Interpolation, class_row
from remap.remapping.knowledge.attention.block_term import RowTerm, log_mean
from remap.remapping.objective import Pair
from remap.remapping.signals import Attention
from remap.tuning.base import Options

# Added to a head's resized probabilities in front of their logarithm: the cubic filter leaves zeros, and one of them
# would take an entry out of the product of all heads.
FLOOR = 1e-6


class ClassRow(RowTerm):
    """Wang et al. 2022 (AttnDistill), arXiv 2210.00944: where the student's class token looks follows the teacher's.

    KL(teacher || student) of the class token's row, mean over images and block pairs. On another grid the patch part
    of the teacher's row is resized as an image and keeps its mass, and the class weight stays what it was (head by
    head, unless heads are averaged). ``product`` is the paper's way to compare any numbers of heads: softmax of the
    sum over heads of log-probabilities, divided by a temperature; rows that were resized are raised by 1e-6 for it.
    Only this one row is ever computed, not the map.
    One item a teacher block: (B, S), or (B, H, S) for ``heads: each``.
    """

    class Config(RowTerm.Config):
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

    @classmethod
    def temperatures_of(cls, config: Options) -> dict[str, Any]:  # noqa: ARG003 - of the interface
        return {}  # none that may change: it is in the teacher's rows, which are cached

    def details(self) -> tuple[str, ...]:
        return (f"heads={self.config.heads}", f"T={self.temperature:g}")

    def read(self, attention: Attention, grid: tuple[int, int]) -> dict[str, Tensor]:
        product = self.config.heads == "product"
        log_x1S = class_row(attention).scores_BHSS().log_softmax(dim=-1)
        if self.config.heads == "mean":
            log_x1S = log_mean(log_x1S)
        if grid != attention.grid:
            row_x1S = self.resize(attention, grid).rows(log_x1S.exp())
            log_x1S = (row_x1S + FLOOR if product else row_x1S).log()
        if product:
            log_x1S = log_x1S.sum(dim=1)
        return {"row": (log_x1S / self.temperature).log_softmax(dim=-1).squeeze(-2)}
