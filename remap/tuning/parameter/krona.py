"""KronA (Edalati et al. 2022, arXiv 2212.10650): a Kronecker product added to linear layers.

Letters: T rows (all leading dimensions), the left factor A (a1, a2), the right factor B (b1, b2).
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, Projection
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.layers import ProjectionTargets, chosen, target_words
from remap.tuning.weights import Delta, attach_deltas, weight_of


class KronA(Method):
    """W + scale * A (x) B: a1*a2 + b1*b2 parameters for a matrix of a1*b1 rows and a2*b2 columns.

    The product has the rank of A times that of B, which may be full, from as few parameters as LoRA's.
    """

    class Config(Options):
        factor: int | None = Field(
            default=None,
            ge=1,
            description="Rows of the left factor; null is the divisor of the output width above its square root.",
        )
        scale: float = Field(default=1.0, gt=0.0, description="Factor on the update.")
        targets: ProjectionTargets = None

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        words, factor = target_words(anatomy, self.config.targets), self.config.factor
        deltas: dict[Projection, Delta] = {}
        edits = Edits(model)
        for block in anatomy.blocks:
            for word, projection in chosen(block, words).items():
                rows = projection.stop - projection.start
                if factor and rows % factor:
                    raise BackboneError(
                        "krona's factor does not divide the output features of a layer",
                        given=f"factor={factor} and {rows} features in {projection.path}",
                        do="choose a divisor, or leave factor out",
                    )
                like = weight_of(model, projection)
                delta = Kronecker(rows, like.flatten(1).shape[1], self.config)
                path = f"{projection.path}.remap_krona" if anatomy.in_stages else f"{block.block}.remap_krona_{word}"
                deltas[projection] = edits.insert(path, delta, like)
        return attach_deltas(edits, deltas)


class Kronecker(Delta):
    """scale * left (x) right; the right factor is zero at first."""

    def __init__(self, rows: int, columns: int, config: KronA.Config) -> None:
        super().__init__()
        a1 = config.factor or _divisor_above_root(rows)
        a2 = columns // _divisor_above_root(columns)
        self.scale = config.scale
        self.left = nn.Parameter(torch.empty(a1, a2))
        self.right = nn.Parameter(torch.zeros(rows // a1, columns // a2))
        nn.init.kaiming_uniform_(self.left, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return self.scale * torch.kron(self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        """Return (A (x) B) x = A X B^T with x read as X (a2, b2), so that the product itself is never made."""
        (a1, a2), (b1, b2) = self.left.shape, self.right.shape
        inner = x.reshape(-1, b2) @ (self.scale * self.right.T).to(x.dtype)  # (T*a2, b1)
        outer = self.left.to(inner.dtype) @ inner.view(-1, a2, b1)  # (T, a1, b1)
        return outer.view(*x.shape[:-1], a1 * b1)


def _divisor_above_root(size: int) -> int:
    """Return the smallest divisor that is at least the square root."""
    return next(divisor for divisor in range(math.isqrt(size - 1) + 1, size + 1) if size % divisor == 0)
