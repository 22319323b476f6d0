"""Cache of teacher outputs for a finite set of augmented views: in memory, or on disk for later runs too."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from remap.cache.output_store import OutputStore, row_digests
from remap.cache.passes import OutputModel, outputs_of
from remap.data.augmentation import Augmentation
from remap.data.augmented_pixels import augmented_view, draws
from remap.data.thread_pool import made_ahead
from remap.data.views import ViewSource
from remap.distributed import collectives
from remap.distributed.collectives import all_reduce_max, all_reduce_sum, compute_and_gather, index_chunks
from remap.distributed.interrupts import defer_signals, raise_if_interrupted
from remap.distributed.sharding import is_sharded
from remap.errors import DataError, TrainingError
from remap.io.human_size import number_of
from remap.progress import Progress

MASS_IMAGES = 1000  # over which the mean probability of the stored classes is taken
Chunk = tuple[int, NDArray[np.int64]]  # a view, and images of it
# For a process without a chunk in the last round: others may wait for its part in a sharded teacher.
NO_IMAGES: Chunk = (0, np.arange(0))


@dataclass(frozen=True)
class FiniteViews:
    """All images of a source, or some, in a finite number of views, numbered from 0.

    Attributes:
        chosen: Which images, in ascending order; None is all.
    """

    source: ViewSource
    augmentation: Augmentation
    seed: int
    views: int
    chosen: NDArray[np.int64] | None = None

    @property
    def indices(self) -> NDArray[np.int64]:
        """The images, as numbers in the source."""
        return np.arange(len(self.source.split)) if self.chosen is None else self.chosen

    @property
    def count(self) -> int:
        return len(self.indices) * self.views

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield (view, indices) over everything."""
        for view in range(self.views):
            for chunk in index_chunks(len(self.indices), size):
                yield view, self.indices[chunk]

    def images(self, view: int, indices: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Return what training sees in that view, and which images could be read."""
        return augmented_view(self.source, self.augmentation, self.seed, view, indices)

    def digests(self, view: int, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return what a view shows of some images, as (B, 16): equal digests, equal pixels."""
        # The very draws that the pixels are made with: another augmentation has other digests.
        return row_digests(self.source.digests(indices), draws(self.augmentation, self.seed, view, indices))


class InMemory:
    """Outputs of all images and views in memory, as they were computed."""

    def __init__(self) -> None:
        self._views: dict[int, dict[str, Tensor]] = {}
        self._filled: dict[int, NDArray[np.bool_]] = {}

    def rows(self, indices_B: NDArray[np.int64], view: int) -> dict[str, Tensor]:
        """Return the outputs of some images in a view.

        Raises:
            DataError: An image could not be read when the outputs were computed.
        """
        lacking = int((~self._filled[view][indices_B]).sum()) if view in self._filled else len(indices_B)
        if lacking:
            raise DataError(
                f"{number_of(lacking, 'image')} without teacher outputs: not readable when they were computed",
                do="make sure that the images stay readable; then resume the run with --resume",
            )
        rows = torch.from_numpy(indices_B)
        return {name: value[rows] for name, value in self._views[view].items()}

    def readable(self, view: int = 0) -> NDArray[np.int64]:
        """Return the images whose outputs in a view are there."""
        return np.flatnonzero(self._filled[view]) if view in self._filled else np.arange(0)

    def only(self, names: Collection[str]) -> "InMemory":
        """Return some of the outputs, which both then share."""
        other = InMemory()
        other._filled = {view: filled.copy() for view, filled in self._filled.items()}
        other._views = {
            view: {name: rows for name, rows in stored.items() if name in names} for view, stored in self._views.items()
        }
        return other

    def close(self) -> None:
        """Do nothing: other runs of a comparison may share the outputs."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it by name, for a file."""
        filled = {f"{view}": torch.from_numpy(rows) for view, rows in self._filled.items()}
        outputs = {f"{view}/{name}": value for view, one in self._views.items() for name, value in one.items()}
        return filled | outputs

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "InMemory":
        """Return what ``tensors`` was called on."""
        found = cls()
        for key, value in tensors.items():
            view, _, name = key.partition("/")
            if name:
                found._views.setdefault(int(view), {})[name] = value
            else:
                found._filled[int(view)] = value.numpy()
        return found

    def put(self, view: int, indices_B: NDArray[np.int64], outputs: Mapping[str, Tensor], count: int) -> None:
        stored = self._views.setdefault(view, {})
        self._filled.setdefault(view, np.zeros(count, dtype=bool))[indices_B] = True
        for name, value in outputs.items():
            # Made when the first rows come: only then are their shape and type known.
            if name not in stored:
                stored[name] = torch.zeros(count, *value.shape[1:], dtype=value.dtype)
            stored[name][torch.from_numpy(indices_B)] = value.cpu()


class OnDisk:
    """Outputs in a store on disk; an image in a view is found by the digest of its file and of the view's draws.

    Attributes:
        computed: Rows that had to be computed now, over all processes.
        mass: Mean probability of the stored classes of the logits; None where all are stored.
    """

    def __init__(self, store: OutputStore, views: FiniteViews) -> None:
        self.store, self._views = store, views
        self.computed = 0
        self.mass: float | None = None

    def rows(self, indices_B: NDArray[np.int64], view: int) -> dict[str, Tensor]:
        return self.store.rows(self._views.digests(view, indices_B))

    def lacking(self, chunk: Chunk) -> Chunk:
        """Return the images of a chunk that have no row."""
        view, indices = chunk
        return view, indices[self.store.missing(self._views.digests(view, indices))]

    def close(self) -> None:
        self.store.close()


class OnDiskByFold:
    """Outputs in several stores on disk, each of a teacher that answers a part of the images.

    Args:
        stores: By the number that ``fold_of_N`` has for the images of each.
    """

    def __init__(self, fold_of_N: NDArray[np.int64], stores: Mapping[int, OnDisk]) -> None:
        self._fold_of_N, self._stores = fold_of_N, stores

    def rows(self, indices_B: NDArray[np.int64], view: int) -> dict[str, Tensor]:
        fold_B = self._fold_of_N[indices_B]
        parts = [(np.flatnonzero(fold_B == fold), self._stores[fold]) for fold in np.unique(fold_B).tolist()]
        rows = [store.rows(indices_B[at_b], view) for at_b, store in parts]
        # Back in the order of ``indices_B``.
        order = torch.from_numpy(np.argsort(np.concatenate([at_b for at_b, _ in parts])))
        return {name: torch.cat([one[name] for one in rows])[order] for name in rows[0]}

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


def cache_in_memory(
    teacher: OutputModel,
    views: FiniteViews,
    batch_size: int,
    at_once: int,
    accelerator: Accelerator,
    progress: Progress,
    cached: InMemory | None = None,
) -> InMemory:
    """Run a teacher once over all views, each process over its share; then all hold all outputs.

    The teacher sees ``at_once`` images a pass; ``batch_size`` are read, and sent to the other processes, together.

    Args:
        cached: Outputs of other images of the same source, to be completed.

    Raises:
        TrainingError: An output is not finite.
    """
    cached = InMemory() if cached is None else cached

    def load(chunk: Chunk | None) -> tuple[Tensor, NDArray[np.int64]]:
        return views.images(*(chunk or NO_IMAGES))

    def compute(images: Tensor) -> dict[str, Tensor]:
        return outputs_of(teacher, images, batch_size, at_once)

    def check_signals() -> None:
        raise_if_interrupted(accelerator, "teacher outputs were being computed")

    # A signal waits for the end of a round: a process that left in the middle would leave the others waiting.
    with defer_signals(), progress.wait("teacher outputs", views.count) as step:
        chunks = list(views.chunks(batch_size))
        gathered = compute_and_gather(accelerator, chunks, load, compute, check_signals)
        for (view, indices), readable, outputs in gathered:
            # Checked before they are stored: each epoch would read them again.
            _require_finite(outputs, views, readable)
            cached.put(view, readable, outputs, len(views.source.split))
            step.advance(len(indices))
    return cached


def cache_on_disk(
    teacher: OutputModel,
    store: OutputStore,
    views: FiniteViews,
    batch_size: int,
    at_once: int,
    accelerator: Accelerator,
    progress: Progress,
    known: InMemory | None = None,
) -> OnDisk:
    """Compute what a store lacks; each process computes its share.

    The teacher sees ``at_once`` images a pass; ``batch_size`` are read and written together.

    Args:
        known: All outputs, where an earlier pass gave them; the teacher is not run then.

    Raises:
        TrainingError: An output is not finite; it is not written.
    """
    cached, sharded = OnDisk(store, views), is_sharded(teacher.network)
    chunks = list(views.chunks(batch_size))
    try:
        with defer_signals(), progress.wait("teacher outputs on disk", views.count) as step:
            rounds = collectives.rounds_of_chunks(accelerator, chunks)
            # Of an image that cannot be read there is no row; it is looked at again each time.
            lacking = ((taken, cached.lacking(mine or NO_IMAGES)) for taken, mine in rounds)
            for (taken, (view, _)), (images, readable) in made_ahead(lambda one: views.images(*one[1]), lacking):
                raise_if_interrupted(accelerator, "teacher outputs were being computed; those so far are cached")
                # A sharded teacher needs all processes in each pass, also those that lack no rows.
                (most,) = all_reduce_max(accelerator, len(readable)) if sharded else (len(readable),)
                if known is not None:
                    outputs = known.rows(readable, view) if len(readable) else {}
                else:
                    outputs = outputs_of(teacher, images, batch_size, at_once) if most else {}
                if len(readable):
                    _require_finite(outputs, views, readable)
                    store.append(views.digests(view, readable), outputs)
                    cached.computed += len(readable)
                step.advance(sum(len(indices) for _, indices in taken))
    finally:  # what an interrupted build has computed is there for the next one
        store.flush()
    # Also waits for the other processes, whose rows are on the disk then.
    cached.computed = int(all_reduce_sum(accelerator, torch.tensor(cached.computed, device=accelerator.device)))
    store.refresh()
    if any(form.top_k for form in store.formats.values()):
        some = views.digests(0, views.indices[:MASS_IMAGES])
        cached.mass = store.mass(np.delete(some, store.missing(some), axis=0))  # unreadable images have no rows
    return cached


def missing_rows(store: OutputStore, views: FiniteViews, batch_size: int) -> int:
    """Return how many rows of all views a store lacks."""
    return sum(len(store.missing(views.digests(view, indices))) for view, indices in views.chunks(batch_size))


def _require_finite(outputs: Mapping[str, Tensor], views: FiniteViews, indices_B: NDArray[np.int64]) -> None:
    """Raise a TrainingError for outputs that would spoil every epoch that reads them again."""
    for name, value in outputs.items():
        finite = torch.isfinite(value).flatten(1).all(dim=1).cpu().numpy()
        if not finite.all():
            images = number_of(int((~finite).sum()), "image")
            raise TrainingError(
                f"the teacher's {name} is not finite for {images}; none of it was cached",
                given=", ".join(views.source.split.names[index] for index in indices_B[~finite][:5]),
                do="set train.precision=fp32, or choose other weights for the teacher",
            )
