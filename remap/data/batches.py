"""Micro-batches: augmented and mixed images with their labels; a pure function of (seed, epoch, index).

Two images are mixed as raw pixels, rounded back to uint8, so that teacher and student see the very same image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.data import keyed_random, mixing
from remap.data.augmented_pixels import seen
from remap.data.order import EpochPlan
from remap.data.thread_pool import made_ahead
from remap.data.views import ViewSource


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        images_BCHW: Raw pixels, uint8.
        labels_B: Class indices, int64, or multi-hot (B, C), int8; -1 without a label.
        indices_B: Positions in the split, int64 on the CPU.
        keys_B: One key an image for dropout, int64.
        share: Its readable images as a part of the step's global batch: below the plan's where some cannot be read.
        other_B: Label of the image that was mixed into each one (its own where none was); None where nothing is mixed.
        share_B: How much of each image is its own, float32; None where nothing is mixed.
        view: Number of the view that the images are seen in, for ``augmented_view``.
        plain_BCHW: The images before augmentation, uint8, where the plan wants them.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    indices_B: NDArray[np.int64]
    keys_B: Tensor
    share: float
    other_B: Tensor | None = None
    share_B: Tensor | None = None
    view: int = 0
    plain_BCHW: Tensor | None = None


def batches(source: ViewSource, plan: EpochPlan, epoch: int, first_step: int = 0) -> Iterator[Batch]:
    """Yield the micro-batches of an epoch; the next ones are made while the current one trains."""
    for _, batch in made_ahead(partial(_make, source, plan, epoch), plan.pairs(epoch, first_step)):
        yield batch


def _make(source: ViewSource, plan: EpochPlan, epoch: int, pair: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Batch:
    (indices, partners), view = pair, plan.view(epoch)
    # Most partners are in the same part of the batch; the others are loaded behind it.
    extra = np.setdiff1d(partners, indices) if plan.mixes else indices[:0]
    plain, readable = source.batch(np.concatenate([indices, extra]))
    images = seen(plain, readable, source, plan.augmentation, plan.seed, view)
    other = share = None
    if plan.mixes:
        partner_of = dict(zip(indices.tolist(), partners.tolist(), strict=True))
        images, readable, other, share = _mixed(source, plan, epoch, images, readable, partner_of)
    labels = torch.from_numpy(source.split.labels[readable])
    keys = torch.from_numpy(keyed_random.keys(plan.seed, epoch, readable, keyed_random.DROPOUT).view(np.int64))
    return Batch(
        images,
        labels,
        readable,
        keys,
        len(readable) / plan.step_images,
        other,
        share,
        view,
        plain if plan.plain else None,
    )


def _mixed(
    source: ViewSource,
    plan: EpochPlan,
    epoch: int,
    images: Tensor,
    readable: NDArray[np.int64],
    partner_of: dict[int, int],
) -> tuple[Tensor, NDArray[np.int64], Tensor, Tensor]:
    """Return the images that have a partner, mixed with it: pixels, indices, the partners' labels, the images' shares.

    An image whose partner cannot be read stays as it is.
    """
    row_of = {index: row for row, index in enumerate(readable.tolist())}
    rows = np.asarray([row for index, row in row_of.items() if index in partner_of], dtype=np.int64)
    indices = readable[rows]
    other_rows = np.asarray([row_of.get(partner_of[i], row_of[i]) for i in indices.tolist()], dtype=np.int64)
    others = readable[other_rows]
    draws = keyed_random.uniform(plan.seed, epoch, keyed_random.pairs(indices, others), mixing.DRAWS, keyed_random.MIX)
    draws[indices == others, 0] = 1.0  # above any chance
    images, share = mixing.mix(
        images.index_select(0, torch.from_numpy(rows)),
        images.index_select(0, torch.from_numpy(other_rows)),
        draws,
        mixup=plan.mixup,
        cutmix=plan.cutmix,
        chance=plan.mix_probability,
    )
    labels = source.split.labels
    mixed_B = (share.numpy() < 1.0).reshape(-1, *(1,) * (labels.ndim - 1))
    other = np.where(mixed_B, labels[others], labels[indices])
    return images, indices, torch.from_numpy(other), share
