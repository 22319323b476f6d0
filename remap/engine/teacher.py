"""Teachers in training: in eval mode and never wrapped. They run in each step, or their outputs are cached.

All but ``joint_teacher`` are frozen.
"""

from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from remap.distributed.device_memory import to_device
from remap.distributed.sharding import is_sharded
from remap.engine.average import Average, average_pairs
from remap.network import Network, Runner
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective
from remap.remapping.signals import Needs
from remap.tuning.words import WordHead


class CachedOutputs(Protocol):
    """Outputs of a teacher that need not be computed again (``remap.cache.teacher_cache``)."""

    def rows(self, indices_B: np.ndarray, view: int) -> dict[str, Tensor]:
        """Return the items of some images, seen in one view, on the CPU."""

    def close(self) -> None:
        """Close files."""


class Teacher:
    """Gives the objective's items of one teacher for a batch.

    Args:
        network: A frozen network.
        number: Which of the objective's teachers it is.
        needs: What is read of it besides.

    Attributes:
        sees_plain: Whether it is shown the images without augmentation, whatever the student sees.
        cached: Its outputs for all training images; None where they are computed in each step.
        at_once: The most images whose outputs there was memory for, once it ran out; 0 before.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        number: int,
        accelerator: Accelerator,
        *,
        bf16: bool,
        needs: Needs = Needs(),
    ) -> None:
        self.network, self.number = network, number
        # Taps only what the objective reads of this teacher.
        self.runner = Runner(network, objective.teacher_needs(number) | needs, bf16=bf16)
        self.objective, self.device = objective, accelerator.device
        self.sees_plain = False
        self.cached: CachedOutputs | None = None
        self.at_once = 0
        self._replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._over_batch: list[str] | None = None

    @torch.no_grad()
    def targets(self, images_BCHW: Tensor, indices_B: np.ndarray, view: int) -> dict[str, Tensor]:
        """Return the items of one batch, on the device, cached or computed now."""
        if self.cached is None:
            return self.items(images_BCHW)
        rows = self.cached.rows(indices_B, view)
        return {key: to_device(value, self.device) for key, value in rows.items()}

    @torch.no_grad()
    def items(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Compute the items of raw pixels (B, 3, V, V), uint8."""
        return self.objective.targets(self.runner(images_BCHW.to(self.device)), self.number)

    def shapes(self, view: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Return the shape of one image's row of each item, for views of this shape (C, H, W)."""
        # Shapes follow from the model, so no image has to be read.
        images = torch.zeros(1, *view, dtype=torch.uint8)
        return {key: tuple(value.shape[1:]) for key, value in self.items(images).items()}

    @torch.no_grad()
    def items_over_batch(self, view: tuple[int, int, int]) -> list[str]:
        """Return the items that losses read which compare the images of a batch; found out once, by a black view."""
        if self._over_batch is None:
            signals = self.runner(torch.zeros(1, *view, dtype=torch.uint8, device=self.device))
            terms = self.objective.terms_of(self.number, over_batch=True)
            self._over_batch = sorted({name for term in terms for name in term.target(signals)})
        return self._over_batch

    def hold_bf16(self) -> None:
        """Put bf16 in the place of float32 weights of plain linear and convolutional layers, until ``close``.

        Autocast rounds them in each pass anyway, so every number that comes out is the same. Not in the classifier,
        which is part of a teacher's digest, and not where a method is attached or layers are sharded.
        """
        if self.network.attached.trainable or is_sharded(self.network):
            return
        for path, module in self.network.model.named_modules():
            # Not isinstance: a subclass may read its weight in another way.
            if type(module) in (nn.Linear, nn.Conv2d) and not self.network.anatomy.is_head(f"{path}."):
                for name, weight in module._parameters.items():
                    if weight is not None and weight.dtype == torch.float32:
                        self._replaced.append((module, name, weight))
                        # Another parameter, not other numbers in this one: ``close`` puts it back as it was.
                        module._parameters[name] = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)

    def learn(self, labels: Labels, share: float) -> None:
        """Learn from the labels of the images that ``targets`` was given last, where the teacher is trained.

        Args:
            share: Weight of their mean loss in the gradient of the step.
        """

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained of it and is not the student's, by name."""
        return {}

    def after_step(self, student: Network, update: int) -> None:
        """Follow the student; called after update number ``update`` (from 0 over the whole run)."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what changes in training and has to be in a checkpoint."""
        return {**self.parameters()}

    def close(self) -> None:
        """Take the hooks off the network, give it its weights back, and close the cache."""
        self.runner.tap.close()
        for module, name, weight in self._replaced:
            module._parameters[name] = weight
        self._replaced = []
        if self.cached is not None:
            self.cached.close()


class AverageTeacher(Teacher):
    """The moving average of the student ("mean teacher", Tarvainen and Valpola 2017, arXiv 1703.01780).

    Args:
        network: ``averaged_copy`` of the student.
        decay: Share of the average that stays in each step, once there were enough steps.
        sees_plain: As in ``Teacher``: the weak view of what the student sees augmented.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        number: int,
        accelerator: Accelerator,
        *,
        bf16: bool,
        decay: float,
        sees_plain: bool = False,
    ) -> None:
        super().__init__(network, objective, number, accelerator, bf16=bf16)
        self.decay, self.sees_plain = decay, sees_plain
        self._average: Average | None = None

    def after_step(self, student: Network, update: int) -> None:
        if self._average is None:  # once, in the first step: before, both networks may be moved or sharded
            self._average = Average(average_pairs(self.network, student), self.decay)
        self._average.follow(update)
        for module in self.network.model.modules():
            if isinstance(module, WordHead) and module.language.names:
                module.write()  # the student writes its own where an epoch ends: the average would lag

    def tensors(self) -> dict[str, Tensor]:
        # The student's tensors have the same names.
        return {f"teacher{self.number}.{name}": tensor for name, tensor in self.network.tensors.items()}
