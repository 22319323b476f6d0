"""Teachers in training: frozen, in eval, never wrapped; asked each step, or once (``remap.cache.teacher_cache``)."""

from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from remap.engine.self_teachers import move_average, pairs_of
from remap.network import Network, Runner
from remap.remapping.objective import Objective


class Kept(Protocol):
    """Outputs of a teacher that need not be computed again."""

    def rows(self, indices_B: np.ndarray, view: int) -> dict[str, Tensor]:
        """The items of some images, seen in one view, on the CPU."""

    def close(self) -> None:
        """Let go of files."""


class Teacher:
    """Gives the objective's items of one teacher for a batch.

    Args:
        network: A frozen network.
        number: Which of the objective's teachers it is.

    Attributes:
        kept: Its outputs for all training images, where they are kept.
        at_once: The most images whose outputs there was memory for, once it ran out; 0 before.
    """

    def __init__(
        self, network: Network, objective: Objective, number: int, accelerator: Accelerator, *, bf16: bool
    ) -> None:
        self.network, self.number = network, number
        self.runner = Runner(network, objective.teacher_needs(number), bf16=bf16)
        self.objective, self.device = objective, accelerator.device
        self.kept: Kept | None = None
        self.at_once = 0

    @torch.no_grad()
    def targets(self, images_BCHW: Tensor, indices_B: np.ndarray, view: int) -> dict[str, Tensor]:
        """Items of one batch, on the device."""
        if self.kept is not None:
            found = self.kept.rows(indices_B, view)
            return {key: value.to(self.device, non_blocking=True) for key, value in found.items()}
        return self.items(images_BCHW)

    @torch.no_grad()
    def items(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Items of raw pixels (B, 3, V, V), computed now."""
        return self.objective.targets(self.runner(images_BCHW.to(self.device)), self.number)

    def shapes(self, view_size: int) -> dict[str, tuple[int, ...]]:
        """Shape of one image's row of each item."""
        images = torch.zeros(1, 3, view_size, view_size, dtype=torch.uint8)
        return {key: tuple(value.shape[1:]) for key, value in self.items(images).items()}

    def after_step(self, student: Network, step: int) -> None:
        """Called after update number ``step``."""

    def tensors(self) -> dict[str, Tensor]:
        """What changes in training and has to be in a checkpoint."""
        return {}

    def close(self) -> None:
        self.runner.tap.close()
        if self.kept is not None:
            self.kept.close()


class AverageTeacher(Teacher):
    """The running average of the student ("mean teacher", Tarvainen and Valpola 2017, arXiv 1703.01780)."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        number: int,
        accelerator: Accelerator,
        *,
        bf16: bool,
        decay: float,
    ) -> None:
        super().__init__(network, objective, number, accelerator, bf16=bf16)
        self.decay = decay
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def after_step(self, student: Network, step: int) -> None:
        if not self._pairs:  # found by name once, when both networks are where they stay
            self._pairs = pairs_of(self.network, student)
        move_average(self._pairs, min(self.decay, (1 + step) / (10 + step)))

    def tensors(self) -> dict[str, Tensor]:
        return {f"teacher{self.number}.{name}": tensor for name, tensor in self.network.tensors.items()}
