"""What several adapters share: the bottleneck, running beside a branch, and being put into a model.

Letters: D width, r bottleneck; leading dimensions are batch and tokens, (B, T) or (B, H, W).
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from remap.backbones.anatomy import AttentionBlock
from remap.tuning.base import Edits, Kind
from remap.tuning.dropout import SampleDropout
from remap.tuning.weights import registered_at


class Bottleneck(nn.Module):
    """A(x) = up(dropout(act(down(x)))), (..., D) to (..., D), with biases: 2*D*r + r + D parameters.

    0 at the start: ``up`` is zero, ``down`` is not, so that both can move.
    """

    def __init__(
        self, width: int, bottleneck: int, activation: Callable[[Tensor], Tensor], dropout: float = 0.0, site: int = 0
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(width, bottleneck)
        self.dropout = SampleDropout(dropout, site)
        self.up = nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.dropout(self.activation(self.down(x))))


class Beside(nn.Module):
    """An adapter beside a branch: it reads what enters the branch, and what it makes is added to what leaves it.

    A hook at the branch's beginning keeps the tensor and ``add_to_branch`` after its last module uses it, so what is
    kept lives within one block's forward, also when gradient checkpointing runs the block again. The hooks are bound
    methods, which ``copy.deepcopy`` binds to the copied module.
    """

    _kept: Tensor | None = None

    def keep_input(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook."""
        self._kept = args[0]

    def keep_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook."""
        self._kept = output

    def add_to_branch(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the branch's last module, behind LayerScale and drop-path."""
        # Drop it before running: checkpointing may leave the adapter early, by raising an exception.
        kept, self._kept = self._kept, None
        return output + self(kept)

    def __getstate__(self) -> dict[str, Any]:
        # A forward that was broken off leaves an activation behind, which can be neither copied nor saved.
        return {**self.__dict__, "_kept": None}


def insert_adapter(edits: Edits, block: AttentionBlock, name: str, adapter: Kind) -> Kind:
    """Put an adapter into a block, on the device and in the dtype of its first linear layer; return it."""
    return edits.insert(f"{block.block}.{name}", adapter, registered_at(edits.model, f"{block.fc1}.weight"))
