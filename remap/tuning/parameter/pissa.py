"""Low-rank changes that start from the weight's own parts: PiSSA and OLoRA.

The papers split W into a frozen residual W - s B0 A0 and trained factors that begin at B0 and A0. Here W stays as it
is and the same function is written W + s (B A - B0 A0), so frozen weights do not change and the start is exact.

Letters: i input and o output features of a layer, r rank.
"""

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.tuning.parameter.layer_delta import LayerDelta
from remap.tuning.weights import Delta


class _FromWeight(LayerDelta):
    """What both methods share."""

    @abstractmethod
    def factors(self, weight_oi: Tensor) -> tuple[Tensor, Tensor]:
        """Return B0 (o, r) and A0 (r, i)."""

    def delta(self, weight_oi: Tensor, site: int, called: bool) -> Delta:
        b_or, a_ri = self.factors(weight_oi.float())
        return _MovedFactors(b_or.to(weight_oi.dtype), a_ri.to(weight_oi.dtype))


class PiSSA(_FromWeight):
    """B0 = U_r sqrt(S_r), A0 = sqrt(S_r) V_r^T: the r largest singular values of W (equations 2 to 4), scale 1.

    They are found by subspace iteration from a random start, which misses the exact ones by little and takes
    a few milliseconds a layer. The initial factors are saved with the tuned ones.
    """

    name = "remap_pissa"

    class Config(_FromWeight.Config):
        iterations: int = Field(default=4, ge=0, description="Iterations of the randomised SVD; the paper: 4 and 16.")

    config: Config

    def factors(self, weight_oi: Tensor) -> tuple[Tensor, Tensor]:
        rank = self.config.rank
        # A few more directions than wanted, as Halko et al. advise.
        more = min(rank + 8, *weight_oi.shape)
        u_or, s_r, v_ir = torch.svd_lowrank(weight_oi, q=more, niter=self.config.iterations)
        root_r = s_r[:rank].sqrt()
        return u_or[:, :rank] * root_r, root_r[:, None] * v_ir[:, :rank].T


class OLoRA(_FromWeight):
    """B0 = Q_r, A0 = R_r of W = Q R: orthonormal columns and the first r rows (section 3); scale 1."""

    name = "remap_olora"

    def factors(self, weight_oi: Tensor) -> tuple[Tensor, Tensor]:
        rank = self.config.rank
        # Only the first r columns decide on Q_r, and R_r = Q_r^T W.
        q_or = torch.linalg.qr(weight_oi[:, :rank])[0]
        return q_or, q_or.T @ weight_oi


class _MovedFactors(Delta):
    """delta = B A - B0 A0, exactly 0 as long as the factors are where they began."""

    first_b: Tensor
    first_a: Tensor

    def __init__(self, b_or: Tensor, a_ri: Tensor) -> None:
        super().__init__()
        self.b, self.a = nn.Parameter(b_or.clone()), nn.Parameter(a_ri.clone())
        self.register_buffer("first_b", b_or.clone())
        self.register_buffer("first_a", a_ri.clone())

    def delta(self) -> Tensor:
        up, down = self._moved()
        return up @ down

    def forward(self, x: Tensor) -> Tensor:
        up, down = self._moved()
        return F.linear(F.linear(x, down), up)

    def _moved(self) -> tuple[Tensor, Tensor]:
        """Return B A - B0 A0 = (B - B0) A + B0 (A - A0) as a product, (o, 2r) and (2r, i); each half is 0 at first."""
        up = torch.cat([self.b - self.first_b, self.first_b], dim=1)
        return up, torch.cat([self.a, self.a - self.first_a])
