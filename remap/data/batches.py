"""The order images are seen in and what is done to them on the way; a pure function of (seed, epoch, index)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remap.data import keyed
from remap.data.views import ViewSource


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        images_BCHW: Raw pixels, uint8.
        labels_B: Class indices, int64.
        indices_B: Positions in the split, int64 on the CPU.
        keys_B: One key an image for dropout, int64.
        share: The part of the step's global batch that this micro-batch stands for.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    indices_B: np.ndarray
    keys_B: Tensor
    share: float


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut: ``batch_size`` is global; each step has ``accumulation`` micro-batches on each process.

    An epoch has floor(images / batch_size) steps, so every step has the full batch; what is left over differs from
    epoch to epoch. A split smaller than a batch is one step.
    """

    seed: int
    images: int
    batch_size: int
    accumulation: int
    rank: int
    processes: int
    augment: str

    @property
    def steps(self) -> int:
        return max(1, self.images // self.batch_size)

    @property
    def step_images(self) -> int:
        """Images of one step, all processes together."""
        return min(self.batch_size, self.images)

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """Indices of this process, one array for each micro-batch, from step ``first_step`` on."""
        order = keyed.permutation(self.seed, epoch, self.images)
        size = self.step_images
        shares = self.processes * self.accumulation
        for step in range(first_step, self.steps):
            parts = np.array_split(order[step * size : (step + 1) * size], shares)
            yield from parts[self.rank * self.accumulation : (self.rank + 1) * self.accumulation]


def batches(source: ViewSource, plan: Plan, epoch: int, first_step: int = 0) -> Iterator[Batch]:
    """Micro-batches of an epoch; the next one is made while the current one trains."""
    arrays = plan.micro_batches(epoch, first_step)
    with ThreadPoolExecutor(1) as ahead:
        pending = None
        for indices in arrays:
            following = ahead.submit(_make, source, plan, epoch, indices)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _make(source: ViewSource, plan: Plan, epoch: int, indices: np.ndarray) -> Batch:
    images, good = source.batch(indices)
    images = augment(images, plan.augment, keyed.uniform(plan.seed, epoch, good, 3))
    keys = torch.from_numpy(keyed.keys(plan.seed, epoch, good, keyed.DROPOUT).view(np.int64))
    share = len(indices) / plan.step_images
    return Batch(images, torch.from_numpy(source.split.labels[good]), good, keys, share)


def augment(images_BCHW: Tensor, kind: str, draws_B3: np.ndarray) -> Tensor:
    """Shift by up to an eighth of the side (edges filled with zeros) and mirror, each image by its own draws."""
    if kind == "none" or not len(images_BCHW):
        return images_BCHW
    images, size = images_BCHW, images_BCHW.shape[-1]
    if kind == "shift_flip":
        mirrored = torch.from_numpy(draws_B3[:, 2] < 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    pad = size // 8
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    offsets = torch.from_numpy((draws_B3[:, :2] * (2 * pad + 1)).astype(np.int64))
    span = torch.arange(size)
    rows = (offsets[:, :1] + span)[:, None, :, None]
    columns = (offsets[:, 1:] + span)[:, None, None, :]
    which = torch.arange(len(images))[:, None, None, None]
    return padded[which, torch.arange(3)[None, :, None, None], rows, columns]
