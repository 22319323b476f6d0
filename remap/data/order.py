"""The epoch plan: in which order images are seen, how an epoch is cut into steps, and which images are mixed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remap.data import keyed_random
from remap.data.augmentation import Augmentation
from remap.data.balance import draw


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch is cut: ``batch_size`` is global; each step has ``accumulation`` micro-batches on each process.

    An epoch has floor(images / batch_size) steps, so that every step has a full batch; the images left over differ
    from epoch to epoch. A split smaller than a batch is one step. All is a function of (seed, epoch).

    Attributes:
        source_images: How many images, the first ones, are of the domain with labels; None is one domain. They and
            those of the other domain take turns in a batch, each in an order of its own that begins again at its end.
        plain: Whether batches hold the images as they are besides, for teachers that see them so.
        expected: How often each image is drawn in an epoch (N,), where classes are balanced; None draws each once.
        augmentation, views, mixup, cutmix, mix_probability: As in ``DataSpec``.
    """

    seed: int
    images: int
    batch_size: int
    accumulation: int
    rank: int
    processes: int
    augmentation: Augmentation
    views: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    expected: NDArray[np.float64] | None = None
    source_images: int | None = None
    plain: bool = False

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return max(1, self.images // self.batch_size)

    @property
    def step_images(self) -> int:
        """Images of one step, all processes together."""
        return min(self.batch_size, self.images)

    def labeled_share(self, labeled: float) -> float:
        """Return the share of images, as they are seen, whose labels are known: of a mixed one, both.

        Args:
            labeled: Share of the images themselves that have a label.
        """
        if self.source_images is not None:  # and nothing is mixed
            return 0.5
        # The partner is one of the other images; the last one of an odd number has none.
        other = max(0.0, labeled * self.images - 1) / max(1, self.images - 1)
        paired = self.step_images // 2 * 2 / self.step_images
        mixed = paired * self.mix_probability if self.mixes else 0.0
        return labeled * (1.0 - mixed + mixed * other)

    def view(self, epoch: int) -> int:
        """Return the number of the view that this epoch sees; without augmentation there is one."""
        if not self.augmentation.on:
            return 0
        return epoch if self.views is None else epoch % self.views

    def pairs(self, epoch: int, first_step: int = 0) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the indices of each micro-batch of this process, and of its images' partners in mixing.

        Neighbours in the order of the global batch are partners (0 and 1, 2 and 3, ...), on any process; the last of
        an odd number is its own.
        """
        if self.source_images is not None:
            order = self._in_turns(epoch, self.source_images)
        elif self.expected is None:
            order = keyed_random.permutation(self.seed, epoch, self.images)
        else:
            order = draw(self.seed, epoch, self.expected)
        size = self.step_images
        parts = np.array_split(np.arange(size), self.processes * self.accumulation)
        mine = parts[self.rank * self.accumulation :][: self.accumulation]
        for step in range(first_step, self.steps):
            batch = order[step * size : (step + 1) * size]
            for positions in mine:
                partners = np.where((positions ^ 1) < size, positions ^ 1, positions)
                yield batch[positions], batch[partners]

    def _in_turns(self, epoch: int, source_images: int) -> NDArray[np.int64]:
        order = np.empty(self.steps * self.step_images, dtype=np.int64)
        for domain, first, count in ((0, 0, source_images), (1, source_images, self.images - source_images)):
            wanted = len(order[domain::2])
            # Each pass over a domain is drawn by itself; epochs have less than 32 bits.
            passes = [(2 * number + domain) << 32 for number in range(-(-wanted // count))]
            drawn = [keyed_random.permutation(self.seed, epoch + one, count) for one in passes]
            order[domain::2] = first + np.concatenate([*drawn, order[:0]])[:wanted]
        return order
