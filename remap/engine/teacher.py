"""The teacher in training: frozen, in eval, never wrapped; asked each step, or once when views never change."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from remap.data.views import ViewSource
from remap.network import Network, Runner
from remap.progress import Progress
from remap.remapping.objective import Objective


class Teacher:
    """Gives the objective's targets for a batch.

    Args:
        network: A frozen network.

    Attributes:
        kept: Targets of all training images, once ``precompute`` has run (or another run's were put here).
    """

    def __init__(self, network: Network, objective: Objective, accelerator: Accelerator, *, bf16: bool) -> None:
        self.runner = Runner(network, objective.teacher_needs(), bf16=bf16)
        self.objective, self.device = objective, accelerator.device
        self.kept: dict[str, Tensor] | None = None

    @torch.no_grad()
    def targets(self, images_BCHW: Tensor, indices_B: np.ndarray) -> dict[str, Tensor]:
        """Targets of one batch, on the device."""
        if self.kept is not None:
            rows = torch.from_numpy(indices_B)
            return {key: value[rows].to(self.device, non_blocking=True) for key, value in self.kept.items()}
        return self.objective.targets(self.runner(images_BCHW))

    @torch.no_grad()
    def precompute(self, source: ViewSource, batch_size: int, progress: Progress) -> None:
        """Run once over fixed views; afterwards ``targets`` looks them up and the teacher is not needed."""
        count = len(source.split)
        kept: dict[str, Tensor] = {}
        with progress.wait("teacher outputs", count) as step:
            for start in range(0, count, batch_size):
                images, good = source.batch(np.arange(start, min(start + batch_size, count)))
                if len(good):
                    found = self.objective.targets(self.runner(images.to(self.device)))
                    for key, value in found.items():
                        whole = kept.setdefault(key, torch.zeros(count, *value.shape[1:], dtype=value.dtype))
                        whole[torch.from_numpy(good)] = value.cpu()
                step.advance(min(batch_size, count - start))
        self.kept = kept

    def bytes_per_image(self, view_size: int) -> int:
        """Memory that ``precompute`` takes for each image."""
        images = torch.zeros(1, 3, view_size, view_size, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            found = self.objective.targets(self.runner(images))
        return sum(value.numel() * value.element_size() for value in found.values())

    def close(self) -> None:
        self.runner.tap.close()
