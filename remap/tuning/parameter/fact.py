"""FacT (Jie and Deng 2023, arXiv 2212.03145): one tensor factorisation for the weight changes of all layers.

The matrices of all blocks, cut into squares of D x D, are stacked to one tensor (squares, D, D), whose change is
factorised. Letters: T rows (all leading dimensions), D width, H MLP width, r rank, m square, M number of squares.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, Projection
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.dropout import SampleDropout
from remap.tuning.layers import by_layer
from remap.tuning.weights import Delta, attach_deltas, drop, registered_at, require_rank

Grid = tuple[int, int]  # rows and columns of squares that cover a layer's weight


class Factors(nn.Module):
    """What all squares of one width share: U and V; how the cores come about is the subclass's.

    W_m + scale * V core_m U. U (``down``) starts as a linear layer does, V (``up``) at zero.

    Attributes:
        down: (r, D).
        up: (r, D).
        dropouts: One for every layer, on the r units behind its cores.
    """

    def __init__(self, width: int, grids: Sequence[Grid], config: "_FacT.Config", sites: Sequence[int]) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.Parameter(torch.empty(config.rank, width))
        self.up = nn.Parameter(torch.zeros(config.rank, width))
        self.dropouts = nn.ModuleList(SampleDropout(config.dropout, site) for site in sites)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @abstractmethod
    def cores(self, first: int, last: int) -> Tensor:
        """Return (last - first, r, r): the cores of these squares."""


class TensorTrain(Factors):
    """One core for every square: M*r*r parameters.

    The cores of a layer start as one linear layer from all of its columns of squares (official code): those of fc2
    are half as large as the others.
    """

    def __init__(self, width: int, grids: Sequence[Grid], config: "_FacT.Config", sites: Sequence[int]) -> None:
        super().__init__(width, grids, config, sites)
        fan_in_M = torch.tensor([columns * config.rank for rows, columns in grids for _ in range(rows * columns)])
        self.sigma = nn.Parameter(torch.empty(len(fan_in_M), config.rank, config.rank))
        nn.init.uniform_(self.sigma, -1.0, 1.0)
        self.sigma.data /= fan_in_M[:, None, None].sqrt()

    def cores(self, first: int, last: int) -> Tensor:
        return self.sigma[first:last]


class Tucker(Factors):
    """core_m = sum_k P[m, k] C[k]: M*r + r*r*r parameters."""

    def __init__(self, width: int, grids: Sequence[Grid], config: "_FacT.Config", sites: Sequence[int]) -> None:
        super().__init__(width, grids, config, sites)
        self.mix = nn.Parameter(torch.empty(sum(map(math.prod, grids)), config.rank))
        self.core = nn.Parameter(torch.empty(config.rank, config.rank, config.rank))
        nn.init.xavier_uniform_(self.mix)
        nn.init.xavier_uniform_(self.core)

    def cores(self, first: int, last: int) -> Tensor:
        return torch.einsum("mk,kab->mab", self.mix[first:last], self.core)


class _FacT(Method):
    """Squares: q, k, v and o, fc1 cut along its rows and fc2 along its columns, 12 a block where H = 4*D.

    A dimension that is not a multiple of D ends in the middle of a square. Models whose width grows have a U and a V
    for every width. The factors belong to the model, not to a block.
    """

    class Config(Options):
        rank: int = Field(default=16, ge=1, description="Rank of the shared factors.")
        scale: float = Field(default=1.0, gt=0.0, description="Factor on the update; the paper searches it per task.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability behind the cores.")

    factors: type[Factors]
    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        layers_by_width: dict[int, dict[str, tuple[Projection, ...]]] = {}
        for block in anatomy.blocks:
            layers_by_width.setdefault(block.width, {}).update(by_layer(block.projections.values()))
        shared = nn.ModuleDict()
        deltas: dict[Projection, Delta] = {}
        site = 0
        for width, layers in layers_by_width.items():
            weights = {path: registered_at(model, f"{path}.weight") for path in layers}
            grids = {
                path: (math.ceil(weight.shape[0] / width), math.ceil(weight.shape[1] / width))
                for path, weight in weights.items()
            }
            require_rank(self.config.rank, width, next(iter(layers)), (width, width))
            sites = range(site, site + len(layers))
            site += len(layers)
            like = next(iter(weights.values()))
            factors = self.factors(width, list(grids.values()), self.config, sites).to(
                device=like.device, dtype=like.dtype
            )
            shared[f"width_{width}"] = factors
            first = 0
            for index, (path, projections) in enumerate(layers.items()):
                shape = (weights[path].shape[0], weights[path].shape[1])
                layer = Projection(path, 0, shape[0], projections[0].called)
                deltas[layer] = SquaresOfLayer(factors, index, first, grids[path], shape)
                first += math.prod(grids[path])
        edits = Edits(model)
        edits.insert("remap_fact", shared)
        return attach_deltas(edits, deltas)


class FacTTT(_FacT):
    """FacT as a tensor train: 2*D*r + 12*L*r*r parameters."""

    factors = TensorTrain


class FacTTK(_FacT):
    """FacT as a Tucker decomposition: 2*D*r + 12*L*r + r*r*r parameters."""

    class Config(_FacT.Config):
        rank: int = Field(default=32, ge=1, description="Rank of the shared factors.")

    factors = Tucker
    config: Config


class SquaresOfLayer(Delta):
    """The squares of one layer's weight, (rows, columns) of them. Owns no parameters and is registered nowhere.

    Args:
        index: Place of the layer among those that share the factors.
        first: The layer's first square.
        shape: Output and input features of the layer.
    """

    def __init__(self, factors: Factors, index: int, first: int, grid: Grid, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shared = (factors,)  # a tuple, so that the factors do not become a part of every layer
        self.index, self.first, self.grid, self.shape = index, first, grid, shape

    def forward(self, x: Tensor) -> Tensor:
        factors, (rows, columns) = self.shared[0], self.grid
        (rank, width), features = factors.down.shape, x.shape[-1]
        x_TI = F.pad(x.reshape(-1, features), (0, columns * width - features))
        hidden_Tr = x_TI.view(-1, width) @ factors.down.to(x.dtype).T
        # All cores of the layer as one matrix (columns*r, rows*r) from what U gave to what V takes.
        core = self._cores().permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
        behind_Tr = hidden_Tr.view(-1, columns * rank) @ core.to(hidden_Tr.dtype)
        dropout = factors.dropouts[self.index]
        assert isinstance(dropout, SampleDropout)
        behind_Tr = drop(dropout, behind_Tr).view(-1, rank)
        out_TO = (behind_Tr @ (factors.scale * factors.up).to(behind_Tr.dtype)).view(-1, rows * width)
        return out_TO[:, : self.shape[0]].reshape(*x.shape[:-1], self.shape[0])

    def delta(self) -> Tensor:
        """Return the squares (p, q): scale * V core U."""
        factors, (rows, columns) = self.shared[0], self.grid
        squares = torch.einsum("aD,pqab,bE->pDqE", factors.scale * factors.up, self._cores(), factors.down)
        width = factors.down.shape[1]
        return squares.reshape(rows * width, columns * width)[: self.shape[0], : self.shape[1]]

    def _cores(self) -> Tensor:
        """Return (rows, columns, r, r)."""
        return self.shared[0].cores(self.first, self.first + math.prod(self.grid)).unflatten(0, self.grid)
