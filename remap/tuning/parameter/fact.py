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

from remap.backbones.anatomy import Anatomy, Block, Projection, module_at
from remap.tuning.base import Attached, Method, Options, insert_module, inserted_parameters, vectors
from remap.tuning.dropout import SampleDropout
from remap.tuning.weights import Delta, DeltaAttached, drop, registered, require_rank

_PATH = "remap_fact"


class Factors(nn.Module):
    """What all squares of one width share: U and V; how the cores come about is the subclass's.

    W_m + scale * V core_m U. U (``down``) starts as a linear layer does, V (``up``) at zero.

    Attributes:
        down: (r, D).
        up: (r, D).
        dropouts: One for every layer, on the r units behind its cores.
    """

    def __init__(self, width: int, squares: int, config: "FacTTT.Config | FacTTK.Config", sites: Sequence[int]) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.Parameter(torch.empty(config.rank, width))
        self.up = nn.Parameter(torch.zeros(config.rank, width))
        self.dropouts = nn.ModuleList(SampleDropout(config.dropout, site) for site in sites)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @abstractmethod
    def cores(self, first: int, last: int) -> Tensor:
        """(last - first, r, r): the cores of these squares."""


class TensorTrain(Factors):
    """A core of its own for every square: M*r*r parameters."""

    def __init__(self, width: int, squares: int, config: "FacTTT.Config", sites: Sequence[int]) -> None:
        super().__init__(width, squares, config, sites)
        self.sigma = nn.Parameter(torch.empty(squares, config.rank, config.rank))
        nn.init.uniform_(self.sigma, -1 / math.sqrt(config.rank), 1 / math.sqrt(config.rank))

    def cores(self, first: int, last: int) -> Tensor:
        return self.sigma[first:last]


class Tucker(Factors):
    """core_m = sum_k P[m, k] C[k]: M*r + r*r*r parameters."""

    def __init__(self, width: int, squares: int, config: "FacTTK.Config", sites: Sequence[int]) -> None:
        super().__init__(width, squares, config, sites)
        self.mix = nn.Parameter(torch.empty(squares, config.rank))
        self.core = nn.Parameter(torch.empty(config.rank, config.rank, config.rank))
        nn.init.xavier_uniform_(self.mix)
        nn.init.xavier_uniform_(self.core)

    def cores(self, first: int, last: int) -> Tensor:
        return torch.einsum("mk,kab->mab", self.mix[first:last], self.core)


class _FacT(Method):
    """Squares: q, k, v and o, fc1 cut along its rows and fc2 along its columns, 12 a block where H = 4*D.

    A dimension that is no multiple of D ends in the middle of a square. Models whose width grows have a U and a V for
    every width. The factors belong to the model, not to a block.
    """

    factors: type[Factors]
    config: "FacTTT.Config | FacTTK.Config"

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        places: dict[int, dict[str, bool]] = {}
        for block in anatomy.blocks:
            places.setdefault(block.width, {}).update(_layers(block))
        shared = nn.ModuleDict()
        deltas: dict[Projection, Delta] = {}
        site = 0
        for width, layers in places.items():
            like = registered(module_at(model, next(iter(layers))), "weight")
            grids = {path: _grid(registered(module_at(model, path), "weight"), width) for path in layers}
            require_rank(self.config.rank, width, next(iter(layers)), (width, width))
            sites = range(site, site + len(layers))
            site += len(layers)
            squares = sum(rows * columns for rows, columns in grids.values())
            factors = self.factors(width, squares, self.config, sites).to(device=like.device, dtype=like.dtype)
            shared[f"width_{width}"] = factors
            first = 0
            for index, (path, called) in enumerate(layers.items()):
                weight = registered(module_at(model, path), "weight")
                projection = Projection(path, 0, len(weight), called)
                deltas[projection] = SquaresOfLayer(factors, index, first, grids[path], tuple(weight.shape[:2]))
                first += math.prod(grids[path])
        insert_module(model, _PATH, shared)
        names = inserted_parameters(model, [_PATH])
        return DeltaAttached(model, anatomy, deltas, trainable=names, no_decay=vectors(names), added=[_PATH])


class FacTTT(_FacT):
    """FacT as a tensor train: 2*D*r + 12*L*r*r parameters."""

    class Config(Options):
        """Options."""

        rank: int = Field(default=16, ge=1, description="Rank of the shared factors.")
        scale: float = Field(default=1.0, gt=0.0, description="Factor on the update; the paper searches it per task.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability behind the cores.")

    factors = TensorTrain
    config: Config


class FacTTK(_FacT):
    """FacT as a Tucker decomposition: 2*D*r + 12*L*r + r*r*r parameters."""

    class Config(Options):
        """Options."""

        rank: int = Field(default=32, ge=1, description="Rank of the shared factors.")
        scale: float = Field(default=1.0, gt=0.0, description="Factor on the update; the paper searches it per task.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability behind the cores.")

    factors = Tucker
    config: Config


class SquaresOfLayer(Delta):
    """The squares of one layer's weight, (rows, columns) of them. Owns no parameters and is registered nowhere.

    Args:
        index: Place of the layer among those that share the factors.
        first: The layer's first square.
        shape: Output and input features of the layer.
    """

    def __init__(self, factors: Factors, index: int, first: int, grid: tuple[int, int], shape: tuple[int, int]) -> None:
        super().__init__()
        self.shared = (factors,)  # a tuple, so that the factors do not become a part of every layer
        self.index, self.first, self.grid, self.shape = index, first, grid, shape

    def forward(self, x: Tensor) -> Tensor:
        factors, (rows, columns) = self.shared[0], self.grid
        (rank, width), features = factors.down.shape, x.shape[-1]
        x_TI = F.pad(x.reshape(-1, features), (0, columns * width - features))
        hidden_Tr = x_TI.view(-1, width) @ factors.down.to(x.dtype).T
        behind_Tr = hidden_Tr.view(-1, columns * rank) @ self._core().to(hidden_Tr.dtype)
        behind_Tr = drop(factors.dropouts[self.index], behind_Tr).view(-1, rank)
        out_TO = (behind_Tr @ (factors.scale * factors.up).to(behind_Tr.dtype)).view(-1, rows * width)
        return out_TO[:, : self.shape[0]].reshape(*x.shape[:-1], self.shape[0])

    def delta(self) -> Tensor:
        """Square (p, q): scale * V core U."""
        factors, (rows, columns) = self.shared[0], self.grid
        cores = self._cores().unflatten(0, (rows, columns))
        squares = torch.einsum("aD,pqab,bE->pDqE", factors.scale * factors.up, cores, factors.down)
        width = factors.down.shape[1]
        return squares.reshape(rows * width, columns * width)[: self.shape[0], : self.shape[1]]

    def _cores(self) -> Tensor:
        return self.shared[0].cores(self.first, self.first + math.prod(self.grid))

    def _core(self) -> Tensor:
        """(columns*r, rows*r): all cores of the layer as one matrix from what U gave to what V takes."""
        cores = self._cores().unflatten(0, self.grid)  # (rows, columns, r, r)
        return cores.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


def _layers(block: Block) -> dict[str, bool]:
    """Paths of the block's linear layers in the order q, k, v, o, fc1, fc2, and whether they are called."""
    words = ("q", "k", "v", "o", "fc1", "fc1_gate", "fc2")
    return {block.projections[word].path: block.projections[word].called for word in words if word in block.projections}


def _grid(weight: Tensor, width: int) -> tuple[int, int]:
    """Rows and columns of squares that cover a weight."""
    return math.ceil(weight.shape[0] / width), math.ceil(weight.shape[1] / width)
