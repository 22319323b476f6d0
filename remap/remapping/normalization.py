"""A teacher's features on one scale, so that several teachers, and wide and narrow channels, count alike.

D width; x any leading dimensions.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.errors import BackboneError

Normalization = Literal["layer", "standard", "phi_s"]
# Channels whose standard deviation is below this part of the mean one hold nothing but rounding.
CONSTANT = 1e-4


class TargetNorm(nn.Module):
    """Normalises vectors of one item of a teacher.

    ``layer`` is the layer norm without affine: each vector by itself. The others take statistics of training images
    (``observe``, then ``settle``), which are buffers and so part of a checkpoint. ``standard`` gives each channel mean
    0 and variance 1 (Theia, Shang et al. 2024, arXiv 2407.20179). ``phi_s`` is PHI-S (Ranzinger et al. 2024,
    arXiv 2410.01680): y = H U' (x - mean) / phi with the eigenvectors U of the covariance, an orthogonal Hadamard
    matrix H and phi^2 the mean eigenvalue: each channel then has variance 1, and distances keep their relations.

    Raises:
        BackboneError: ``phi_s`` for a width without a Hadamard matrix of Sylvester's or Paley's construction.
    """

    shift_D: Tensor
    map_: Tensor

    def __init__(self, kind: Normalization, width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        if self.wants_statistics:
            self.register_buffer("shift_D", torch.zeros(width))
            self.register_buffer("map_", hadamard(width) if kind == "phi_s" else torch.ones(width))
            self._seen: list[tuple[int, Tensor, Tensor]] = []

    @property
    def wants_statistics(self) -> bool:
        """Whether it has to see features before it can be used."""
        return self.kind != "layer"

    def observe(self, features_xD: Tensor) -> None:
        """Count features in."""
        rows_ND = features_xD.detach().reshape(-1, self.width).double().cpu()
        squares = rows_ND.mT @ rows_ND if self.kind == "phi_s" else rows_ND.square().sum(0)
        self._seen.append((len(rows_ND), rows_ND.sum(0), squares))

    @torch.no_grad()
    def settle(self) -> None:
        """Fix the statistics to those of all that was observed."""
        counts, sums, squares = zip(*self._seen, strict=True)
        self._seen = []
        count, mean_D = sum(counts), sum(sums) / sum(counts)
        self.shift_D.copy_(mean_D)
        if self.kind == "standard":
            std_D = (sum(squares) / count - mean_D.square()).clamp_min(0.0).sqrt()
            self.map_.copy_(1.0 / std_D.clamp_min(CONSTANT * std_D.mean()).clamp_min(torch.finfo(torch.float32).tiny))
            return
        covariance_DD = sum(squares) / count - mean_D[:, None] * mean_D
        values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
        phi = values_D.clamp_min(0.0).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        self.map_.copy_(vectors_DD @ hadamard(self.width).double().mT / phi)

    def forward(self, features_xD: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(features_xD, features_xD.shape[-1:])
        centred_xD = features_xD - self.shift_D
        return centred_xD * self.map_ if self.kind == "standard" else centred_xD @ self.map_


def hadamard(width: int) -> Tensor:
    """Return an orthogonal matrix (D, D) of entries +-1 / sqrt(D), float32.

    Sylvester's doubling of Paley's first construction for q + 1 with a prime q = 3 mod 4: 12, 20, 24, 32, 44, 48, ...
    so that the usual widths of networks are there.

    Raises:
        BackboneError: There is none for this width.
    """
    core, doublings = width, 0
    while not _has_core(core):
        if core % 2 or core == 0:
            raise BackboneError(
                "normalize: phi_s needs a Hadamard matrix of the teacher's width, and there is none",
                given=f"width {width}",
                allowed="2^k (q + 1) with q = 0, 1 or a prime that leaves 3 when divided by 4, as most widths are",
                do="use normalize: standard",
            )
        core, doublings = core // 2, doublings + 1
    matrix = _paley(core)
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / width**0.5


def _has_core(order: int) -> bool:
    q = order - 1
    return order in (1, 2) or (q % 4 == 3 and all(q % factor for factor in range(3, int(q**0.5) + 1, 2)))


def _paley(order: int) -> Tensor:
    """Return a Hadamard matrix of ``order``: I + S with the skew matrix S of the quadratic residues modulo q."""
    if order <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    q = order - 1
    character = torch.full((q,), -1.0)
    character[torch.tensor([number * number % q for number in range(1, q)])] = 1.0
    character[0] = 0.0
    positions = torch.arange(q)
    skew = torch.zeros(order, order)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(positions[:, None] - positions) % q]
    return skew + torch.eye(order)
