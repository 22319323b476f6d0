"""Teacher outputs that are computed once, where views are a closed list: in memory, or on disk for later runs too."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from remap.cache.records import RecordStore, row_digest
from remap.data import keyed_random
from remap.data.batches import augmented_view, in_passes
from remap.data.views import ViewSource
from remap.distributed.collectives import (
    all_reduce_max,
    all_reduce_sum,
    compute_and_gather,
    index_chunks,
    rounds_of_chunks,
)
from remap.distributed.device_memory import is_out_of_memory
from remap.distributed.interrupts import defer_signals, raise_if_interrupted
from remap.distributed.sharding import is_sharded
from remap.errors import DataError, TrainingError
from remap.network import Network
from remap.progress import Progress

# The mean probability of kept classes is taken over this many images.
MASS_IMAGES = 1000
# The chunk of a process for which there is none: a view, and the indices of no image.
NOTHING = (0, np.arange(0))


class OutputSource(Protocol):
    """A frozen teacher whose outputs are cached (``remap.engine.teacher.Teacher``).

    Attributes:
        at_once: The most images whose outputs there was memory for, once it ran out; 0 before.
    """

    network: Network
    at_once: int

    def items(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Items of raw pixels (B, 3, V, V)."""


@dataclass(frozen=True)
class FiniteViews:
    """All images of a source in a closed list of views, numbered from 0."""

    source: ViewSource
    augment: str
    seed: int
    views: int

    @property
    def count(self) -> int:
        return len(self.source.split) * self.views

    def chunks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(view, indices) over everything."""
        for view in range(self.views):
            for indices in index_chunks(len(self.source.split), size):
                yield view, indices

    def images(self, view: int, indices: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """What training sees in that view, and which images could be read."""
        return augmented_view(self.source, self.augment, self.seed, view, indices)


def view_draws(augment: str, seed: int, view: int, indices_B: np.ndarray) -> np.ndarray:
    """The random numbers behind a view, (B, K); none where views are fixed."""
    return np.zeros((len(indices_B), 0)) if augment == "none" else keyed_random.uniform(seed, view, indices_B, 3)


class InMemory:
    """Items of all images and views in memory, as they were computed."""

    def __init__(self) -> None:
        self._views: dict[int, dict[str, Tensor]] = {}
        self._filled: dict[int, np.ndarray] = {}

    def rows(self, indices_B: np.ndarray, view: int) -> dict[str, Tensor]:
        """As ``CachedOutputs.rows``.

        Raises:
            DataError: An image could not be read when the outputs were computed.
        """
        lacking = int((~self._filled[view][indices_B]).sum()) if view in self._filled else len(indices_B)
        if lacking:
            raise DataError(
                f"there are no teacher outputs for {lacking} image(s), which could not be read when they were computed",
                do="see that the images stay readable; then go on with --resume",
            )
        rows = torch.from_numpy(indices_B)
        return {key: value[rows] for key, value in self._views[view].items()}

    def close(self) -> None:
        """Nothing to let go of: other runs may share it."""

    def put(self, view: int, indices_B: np.ndarray, items: Mapping[str, Tensor], count: int) -> None:
        whole = self._views.setdefault(view, {})
        self._filled.setdefault(view, np.zeros(count, dtype=bool))[indices_B] = True
        for key, value in items.items():
            if key not in whole:
                whole[key] = torch.zeros(count, *value.shape[1:], dtype=value.dtype)
            whole[key][torch.from_numpy(indices_B)] = value.cpu()


class OnDisk:
    """Items in a record store; an image in a view is found by the digest of its file and of the view's draws.

    Attributes:
        computed: Rows that had to be computed now, over all processes.
        mass: Mean probability of the classes kept of the logits; None where all are.
    """

    def __init__(self, store: RecordStore, source: ViewSource, augment: str, seed: int) -> None:
        self.store, self.source, self.augment, self.seed = store, source, augment, seed
        self.computed, self.mass = 0, None

    def rows(self, indices_B: np.ndarray, view: int) -> dict[str, Tensor]:
        return self.store.rows(self.digests(indices_B, view))

    def close(self) -> None:
        self.store.close()

    def digests(self, indices_B: np.ndarray, view: int) -> list[bytes]:
        """Names of images as a view shows them: equal names, equal pixels."""
        draws_BK = view_draws(self.augment, self.seed, view, indices_B)
        files = self.source.digests(indices_B)
        return [row_digest(file, draws.tobytes()) for file, draws in zip(files, draws_BK, strict=True)]


def keep_in_memory(
    teacher: OutputSource,
    lessons: FiniteViews,
    batch_size: int,
    at_once: int,
    accelerator: Accelerator,
    progress: Progress,
) -> InMemory:
    """Run a teacher once over a closed list of views, each process over its share; then all hold all of it.

    Args:
        batch_size: Images that are read, and sent to the other processes, together.
        at_once: Images that the teacher sees at once.

    Raises:
        TrainingError: What it gives is not finite.
    """
    kept = InMemory()

    def compute(chunk: tuple[int, np.ndarray] | None) -> tuple[np.ndarray, dict[str, Tensor]]:
        images, good = lessons.images(*(chunk or NOTHING))
        return good, _items_of(teacher, images, batch_size, at_once)

    def look() -> None:
        raise_if_interrupted(accelerator, "teacher outputs were being computed")

    with defer_signals(), progress.wait("teacher outputs", lessons.count) as step:
        chunks = list(lessons.chunks(batch_size))
        for (view, indices), good, items in compute_and_gather(accelerator, chunks, compute, look):
            _require_finite(items, lessons, good)
            kept.put(view, good, items, len(lessons.source.split))
            step.advance(len(indices))
    return kept


def keep_on_disk(
    teacher: OutputSource,
    store: RecordStore,
    lessons: FiniteViews,
    batch_size: int,
    at_once: int,
    accelerator: Accelerator,
    progress: Progress,
) -> OnDisk:
    """Let a teacher fill the gaps of a store; each process computes its share of them.

    Args:
        batch_size: Images that are read and written together.
        at_once: Images that the teacher sees at once.

    Raises:
        TrainingError: What it gives is not finite; none of that is written.
    """
    kept = OnDisk(store, lessons.source, lessons.augment, lessons.seed)
    chunks = list(lessons.chunks(batch_size))
    try:
        with defer_signals(), progress.wait("teacher outputs on disk", lessons.count) as step:
            for taken, mine in rounds_of_chunks(accelerator, chunks):
                raise_if_interrupted(accelerator, "teacher outputs were being computed; those so far are kept on disk")
                view, indices = mine or NOTHING
                missing = indices[store.missing(kept.digests(indices, view))]
                images, good = lessons.images(view, missing)
                needed = is_sharded(teacher.network) and any(
                    all_reduce_max(accelerator, len(good))
                )  # by other processes
                items = _items_of(teacher, images, batch_size, at_once) if len(good) or needed else {}
                if len(good):
                    _require_finite(items, lessons, good)
                    store.append(kept.digests(good, view), items)
                    kept.computed += len(good)
                step.advance(sum(len(indices) for _, indices in taken))
    finally:  # an interrupted build goes on where it was
        store.flush()
    # Also waits for the other processes.
    kept.computed = int(all_reduce_sum(accelerator, torch.tensor(kept.computed, device=accelerator.device)))
    store.refresh()
    if any(item.top_k for item in store.items.values()):
        some = kept.digests(np.arange(min(MASS_IMAGES, len(lessons.source.split))), 0)
        lacking = set(store.missing(some).tolist())
        kept.mass = store.mass([digest for place, digest in enumerate(some) if place not in lacking])
    return kept


def missing_rows(store: RecordStore, lessons: FiniteViews, batch_size: int) -> int:
    """How many rows of a closed list of views a store lacks."""
    kept = OnDisk(store, lessons.source, lessons.augment, lessons.seed)
    return sum(len(store.missing(kept.digests(indices, view))) for view, indices in lessons.chunks(batch_size))


def _require_finite(items: Mapping[str, Tensor], lessons: FiniteViews, indices_B: np.ndarray) -> None:
    """Refuse outputs that would spoil every epoch that reads them again.

    Raises:
        TrainingError: Names the output and the images.
    """
    for name, value in items.items():
        sound = torch.isfinite(value).flatten(1).all(dim=1).cpu().numpy()
        if not sound.all():
            names = [lessons.source.split.names[index] for index in indices_B[~sound][:5]]
            raise TrainingError(
                f"the teacher's {name} is not finite for {int((~sound).sum())} image(s); nothing of it was kept",
                given=", ".join(names),
                do="set train.precision=fp32, or choose other weights for the teacher",
            )


def _items_of(teacher: OutputSource, images_BCHW: Tensor, batch_size: int, at_once: int) -> dict[str, Tensor]:
    """Items of up to ``batch_size`` images, computed ``in_passes`` of ``at_once``.

    Where memory does not suffice for that many, passes become smaller. A sharded teacher makes as many for no image as
    for all, since other processes take part in each.
    """
    while True:
        size = min(teacher.at_once or at_once, at_once)
        passes = -(-batch_size // size) if is_sharded(teacher.network) else 1
        try:
            return in_passes(teacher.items, images_BCHW, size, passes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1 or is_sharded(teacher.network):
                raise
        teacher.at_once = size // 2
        clear_device_cache(garbage_collection=True)
