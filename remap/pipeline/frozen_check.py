"""Proof that a run left alone what it said it would: the list of what is trained, and a hash over all the rest."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from remap.backbones.build import add_tensors
from remap.distributed.sharding import gather_full
from remap.errors import TrainingError
from remap.network import Network


@dataclass(frozen=True)
class Frozen:
    """What training must not change: all tensors of a student's state that are not trained.

    Attributes:
        sha256: Over names, shapes, dtypes and bytes, in the order of names.
    """

    tensors: int
    numbers: int
    sha256: str

    def __str__(self) -> str:
        """In a few words."""
        return f"{self.tensors} tensors are frozen, SHA-256 {self.sha256[:16]}" if self.tensors else "nothing is frozen"

    @classmethod
    def of(cls, network: Network) -> "Frozen":
        """Of a student as it is now; every process has to call it."""
        changing = network.tensors
        rest = {name: tensor for name, tensor in network.model.state_dict().items() if name not in changing}
        digest = hashlib.sha256()
        for name, tensor in sorted(rest.items()):  # one at a time: a sharded one is put together for it
            add_tensors(digest, {name: gather_full(tensor)})
        return cls(len(rest), sum(tensor.numel() for tensor in rest.values()), digest.hexdigest())

    def require_unchanged(self, network: Network) -> dict[str, Any]:
        """Compare with the student as it is by now; gives what the summary says.

        Raises:
            TrainingError: Something frozen was changed.
        """
        now = Frozen.of(network)
        if now != self:
            raise TrainingError(
                "training changed weights that are frozen; nothing of this student was kept",
                given=f"SHA-256 {self.sha256[:16]} before, {now.sha256[:16]} after",
                do="this is a fault of the method or of code that was added to it: please report it",
            )
        return {"tensors": self.tensors, "parameters": self.numbers, "sha256": self.sha256, "unchanged": True}


def trainables(trained: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """Name, shape and number of everything that is trained, as trainables.json lists it."""
    return [
        {"name": name, "shape": list(parameter.shape), "parameters": parameter.numel()}
        for name, parameter in trained.items()
    ]
