"""When a step goes wrong: what is not finite, what memory ran out of, and what is kept of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from remap.data.batches import Batch
from remap.io import atomic_write


class BrokenWeights(Exception):
    """What is trained is no longer finite; only an earlier checkpoint helps."""


@dataclass(frozen=True)
class Fault:
    """A step whose numbers are not finite.

    Attributes:
        losses: Each loss and their weighted sum, over the global batch.
        norm: Of the gradient.
        unsound: Outputs of teachers that hold something not finite, over all micro-batches and processes.
        rate: The learning rate it would have been stepped with.
        step: Its number in the epoch, from 0.
        broken: Whether the weights themselves were found not finite, after that step.
    """

    losses: Mapping[str, float]
    norm: float
    unsound: int
    rate: float
    step: int
    broken: bool = False

    def __str__(self) -> str:
        named = [f"{name} {value:.4g}" for name, value in self.losses.items()]
        norm = [] if self.broken else [f"gradient norm {self.norm:.4g}"]
        return ", ".join([*named, *norm, f"learning rate {self.rate:.3g}"])

    @property
    def what(self) -> str:
        """Where it began, as far as can be told."""
        if self.broken:
            return "the trained weights are"
        if self.unsound:
            return "the teacher's output is"
        sound = all(abs(value) < float("inf") for value in self.losses.values())
        return "the gradient is" if sound else "the loss is"


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of every floating-point tensor is finite (one transfer from the device)."""
    sound = [torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()]
    return not sound or bool(torch.stack([flag.to(sound[0].device) for flag in sound]).all())


def capture(folder: Path, rank: int, batches: Sequence[Batch], names: Sequence[str], told: Mapping[str, Any]) -> None:
    """Keep the images of a step that went wrong, for a look at them: ``batch-RANK.safetensors`` and ``fault.json``.

    Args:
        rank: Each process keeps its own part of the batch; the first also writes ``fault.json``.
        names: Of all images of the split.
        told: What else is known of the step.
    """
    indices = torch.cat([torch.from_numpy(batch.indices_B) for batch in batches])
    tensors = {
        "images": torch.cat([batch.images_BCHW for batch in batches]),
        "labels": torch.cat([batch.labels_B for batch in batches]),
        "indices": indices,
    }
    atomic_write.make_folder(folder)
    atomic_write.write_bytes(
        folder / f"batch-{rank}.safetensors", save({k: v.contiguous() for k, v in tensors.items()})
    )
    if rank == 0:
        atomic_write.write_json(folder / "fault.json", {**told, "images": [names[index] for index in indices.tolist()]})
