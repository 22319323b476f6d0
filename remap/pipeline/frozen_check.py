"""Proof that training changed nothing that is frozen: a hash over it, before and after."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from remap.backbones.build import add_tensors
from remap.distributed.sharding import gather_full
from remap.errors import TrainingError
from remap.io.human_size import part
from remap.network import Network


@dataclass(frozen=True)
class FrozenWeights:
    """What training must not change: all tensors of a student's state that are not trained.

    Attributes:
        sha256: Over names, shapes, dtypes and bytes, in the order of names.
    """

    tensors: int
    numbers: int
    sha256: str

    @classmethod
    def of(cls, network: Network) -> "FrozenWeights":
        """Of a student as it is now; every process has to call it."""
        # Heads and buffers that training updates are not frozen.
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
        # The same order of names gives the same hash.
        now = FrozenWeights.of(network)
        if now != self:
            raise TrainingError(
                "training changed weights that are frozen; nothing of this student was saved",
                given=f"SHA-256 {self.sha256[:16]} before, {now.sha256[:16]} after",
                do="this is a fault of the method or of code that was added to it: please report it",
            )
        return {"tensors": self.tensors, "parameters": self.numbers, "sha256": self.sha256, "unchanged": True}


def trained_text(trained: Mapping[str, Parameter], student: Network) -> str:
    """Return in a line how much is trained, of the student, in the losses and in the teacher."""
    count = sum(parameter.numel() for parameter in trained.values())
    in_losses = sum(p.numel() for name, p in trained.items() if name.startswith("objective."))
    # What belongs neither to the student nor to a loss is a joint teacher's.
    in_teacher = count - student.num_trainable - in_losses
    total = student.num_parameters + in_losses + in_teacher
    parts = (("losses", in_losses), ("teacher", in_teacher))
    more = "".join(f", {number:,} of them in the {name}" for name, number in parts if number)
    return f"training {count:,} of {total:,} parameters ({part(count, total)}){more}"
