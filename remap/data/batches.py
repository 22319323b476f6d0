"""The order images are seen in and what is done to them on the way; a pure function of (seed, epoch, index).

Two images are mixed as raw pixels, rounded back to uint8, so teacher and student see the very same picture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remap.data import keyed_random, mixing
from remap.data.thread_pool import threads
from remap.data.views import ViewSource


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        images_BCHW: Raw pixels, uint8.
        labels_B: Class indices, int64; -1 without a label.
        indices_B: Positions in the split, int64 on the CPU.
        keys_B: One key an image for dropout, int64.
        share: The part of the step's global batch that this micro-batch stands for.
        other_B: Label of the image that was mixed into each one (its own where none was); None where nothing is mixed.
        share_B: How much of each image is its own, float32; None where nothing is mixed.
        view: Number of the view that the images are seen in, for ``augmented_view``.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    indices_B: np.ndarray
    keys_B: Tensor
    share: float
    other_B: Tensor | None = None
    share_B: Tensor | None = None
    view: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch is cut: ``batch_size`` is global; each step has ``accumulation`` micro-batches on each process.

    An epoch has floor(images / batch_size) steps, so every step has the full batch; what is left over differs from
    epoch to epoch. A split smaller than a batch is one step.

    Attributes:
        augment, views, mixup, cutmix, mix_probability: As in ``DataSpec``.
    """

    seed: int
    images: int
    batch_size: int
    accumulation: int
    rank: int
    processes: int
    augment: str
    views: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def known(self, labeled: float) -> float:
        """Share of the images, as they are seen, whose labels are known: of a mixed one, both.

        Args:
            labeled: Share of the images themselves that have a label.
        """
        mixed = self.mix_probability if self.mixes else 0.0
        return labeled * (1.0 - mixed + mixed * labeled)

    def view(self, epoch: int) -> int:
        """Number of the view that this epoch sees; without augmentation there is one."""
        if self.augment == "none":
            return 0
        return epoch if self.views is None else epoch % self.views

    @property
    def steps(self) -> int:
        return max(1, self.images // self.batch_size)

    @property
    def step_images(self) -> int:
        """Images of one step, all processes together."""
        return min(self.batch_size, self.images)

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """Indices of this process, one array for each micro-batch, from step ``first_step`` on."""
        for own, _ in self.paired(epoch, first_step):
            yield own

    def paired(self, epoch: int, first_step: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As ``micro_batches``, with the index of each image's partner in mixing.

        Neighbours in the order of the global batch are partners (0 and 1, 2 and 3, ...), wherever they are computed;
        the last of an odd number is its own.
        """
        order = keyed_random.permutation(self.seed, epoch, self.images)
        size = self.step_images
        shares = self.processes * self.accumulation
        places = np.array_split(np.arange(size), shares)[self.rank * self.accumulation :][: self.accumulation]
        for step in range(first_step, self.steps):
            batch = order[step * size : (step + 1) * size]
            for own in places:
                partner = np.where((own ^ 1) < size, own ^ 1, own)
                yield batch[own], batch[partner]


def batches(source: ViewSource, plan: EpochPlan, epoch: int, first_step: int = 0) -> Iterator[Batch]:
    """Micro-batches of an epoch; the next one is made while the current one trains."""
    with threads(1) as ahead:
        pending = None
        for indices, partners in plan.paired(epoch, first_step):
            following = ahead.submit(_make, source, plan, epoch, indices, partners)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def augmented_view(
    source: ViewSource, augment: str, seed: int, view: int, indices: Sequence[int] | np.ndarray
) -> tuple[Tensor, np.ndarray]:
    """The very images that training sees in view number ``view``, and the indices that could be read.

    Shapes as ``ViewSource.batch``.
    """
    images, good = source.batch(indices)
    return augmented(images, augment, keyed_random.uniform(seed, view, good, 3)), good


def in_passes(
    run: Callable[[Tensor], Mapping[str, Tensor]], images_BCHW: Tensor, size: int, passes: int = 1
) -> dict[str, Tensor]:
    """What ``run`` makes of images, in passes of exactly ``size``: the last one is filled up with images again.

    The last bits of a matrix product may depend on its shape: what is computed before training is computed in batches
    of the shape of a training step, and has the bits that it would have there.

    Args:
        passes: The least number of them; of black images, where there is none.

    Returns:
        Rows of the images, each (B, ...).
    """
    count = len(images_BCHW)
    whole = max(passes, -(-count // size)) * size
    if not count:
        images_BCHW = images_BCHW.new_zeros(whole, *images_BCHW.shape[1:])
    elif count < whole:
        images_BCHW = images_BCHW.repeat(-(-whole // count), 1, 1, 1)[:whole]
    found = [run(part) for part in images_BCHW.split(size)]
    if len(found) == 1:
        return {name: rows[:count] for name, rows in found[0].items()}
    return {name: torch.cat([part[name] for part in found])[:count] for name in found[0]}


def _make(source: ViewSource, plan: EpochPlan, epoch: int, indices: np.ndarray, partners: np.ndarray) -> Batch:
    view = plan.view(epoch)
    # Most partners are in the same part of the batch; the others are loaded behind it.
    extra = np.setdiff1d(partners, indices) if plan.mixes else indices[:0]
    images, good = augmented_view(source, plan.augment, plan.seed, view, np.concatenate([indices, extra]))
    other = share = None
    if plan.mixes:
        partner_of = dict(zip(indices.tolist(), partners.tolist(), strict=True))
        images, good, other, share = _mixed(source, plan, epoch, images, good, partner_of)
    labels = torch.from_numpy(source.split.labels[good])
    keys = torch.from_numpy(keyed_random.keys(plan.seed, epoch, good, keyed_random.DROPOUT).view(np.int64))
    return Batch(images, labels, good, keys, len(indices) / plan.step_images, other, share, view)


def _mixed(
    source: ViewSource, plan: EpochPlan, epoch: int, images: Tensor, good: np.ndarray, partner_of: dict[int, int]
) -> tuple[Tensor, np.ndarray, Tensor, Tensor]:
    """The images that have a partner, mixed with it: pixels, indices, the partners' labels and the images' shares.

    An image whose partner cannot be read stays as it is.
    """
    row = {index: place for place, index in enumerate(good.tolist())}
    own = np.asarray([place for index, place in row.items() if index in partner_of], dtype=np.int64)
    indices = good[own]
    beside = np.asarray([row.get(partner_of[index], row[index]) for index in indices.tolist()], dtype=np.int64)
    others = good[beside]
    draws = keyed_random.uniform(plan.seed, epoch, keyed_random.pairs(indices, others), mixing.DRAWS, keyed_random.MIX)
    draws[indices == others, 0] = 1.0  # above any chance
    images, share = mixing.mix(
        images.index_select(0, torch.from_numpy(own)),
        images.index_select(0, torch.from_numpy(beside)),
        draws,
        mixup=plan.mixup,
        cutmix=plan.cutmix,
        chance=plan.mix_probability,
    )
    labels = source.split.labels
    other = np.where(share.numpy() < 1.0, labels[others], labels[indices])
    return images, indices, torch.from_numpy(other), share


def augmented(images_BCHW: Tensor, kind: str, draws_B3: np.ndarray) -> Tensor:
    """Shift by up to an eighth of the side (edges filled with zeros) and mirror, each image by its own draws."""
    if kind == "none" or not len(images_BCHW):
        return images_BCHW
    size = images_BCHW.shape[-1]
    pad = size // 8
    images, result = images_BCHW.numpy(), torch.empty_like(images_BCHW)
    offsets = (draws_B3[:, :2] * (2 * pad + 1)).astype(np.int64)
    framed = np.zeros((3, size + 2 * pad, size + 2 * pad), dtype=np.uint8)
    mirrored = (draws_B3[:, 2] < 0.5) & (kind == "shift_flip")
    # One by one, in the processor's cache: several times as fast as all at once.
    for index, (row, column) in enumerate(offsets):
        framed[:, pad : pad + size, pad : pad + size] = images[index, :, :, :: -1 if mirrored[index] else 1]
        result[index] = torch.from_numpy(framed[:, row : row + size, column : column + size])
    return result
