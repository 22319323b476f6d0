"""The views of other sources as those of one: of some images of a source, or of two sources."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.data.views import ViewSource
from remap.progress import Progress


class PartSource(ViewSource):
    """The views of the images ``indices`` of another source.

    It caches nothing: what the other has in memory, and which images it found unreadable, serves here too.
    """

    def __init__(self, source: ViewSource, indices: NDArray[np.int64]) -> None:
        self.source, self.indices = source, indices
        self.view, self.workers = source.view, source.workers
        self.split = source.split.take(indices)
        self.contents = source.contents.taken(indices)

    @property
    def bad(self) -> dict[int, str]:
        bad = self.source.bad
        return {here: bad[there] for here, there in enumerate(self.indices.tolist()) if there in bad} if bad else {}

    @property
    def cached_bytes(self) -> int:
        return 0  # the other counts them

    def load(self, progress: Progress, what: str, rank: int = 0, processes: int = 1) -> Sequence[Tensor]:
        return ()  # the other is loaded by itself

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        chosen = np.asarray(indices, dtype=np.int64)
        pixels, found = self.source.batch(self.indices[chosen])
        return pixels, chosen[np.isin(self.indices[chosen], found)]

    def without_bad(self) -> "PartSource":
        bad = self.bad
        return PartSource(self.source, np.delete(self.indices, list(bad))) if bad else self

    def note_bad(self, bad: Mapping[int, str]) -> None:
        self.source.note_bad({int(self.indices[here]): why for here, why in bad.items()})


class JoinedSource(ViewSource):
    """The views of two sources one after the other.

    It caches nothing: what either has in memory, and which images it found unreadable, are those of both.
    """

    def __init__(self, first: ViewSource, second: ViewSource) -> None:
        assert first.view == second.view
        self.first, self.second = first, second
        self.view, self.workers = first.view, first.workers
        self.split = first.split.joined(second.split)

    @property
    def bad(self) -> dict[int, str]:
        return self.first.bad | {len(self.first.split) + index: why for index, why in self.second.bad.items()}

    @property
    def cached_bytes(self) -> int:
        return self.first.cached_bytes + self.second.cached_bytes

    def load(self, progress: Progress, what: str, rank: int = 0, processes: int = 1) -> Sequence[Tensor]:
        return [part for one in (self.first, self.second) for part in one.load(progress, what, rank, processes)]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        chosen, images, readable, positions = np.asarray(indices, dtype=np.int64), [], [], []
        for source, offset, at in self._parts(chosen):
            if len(at):
                pixels, found = source.batch(chosen[at] - offset)
                images.append(pixels)
                readable.append(found + offset)
                positions.append(at[np.isin(chosen[at] - offset, found)])
        if len(images) < 2:
            return (images[0], readable[0]) if images else self.first.batch(chosen)
        # Each part is in the order of ``indices``, less its bad images; merge them back into it.
        order = np.argsort(np.concatenate(positions))
        return torch.cat(images).index_select(0, torch.from_numpy(order)), np.concatenate(readable)[order]

    def without_bad(self) -> "JoinedSource":
        return JoinedSource(self.first.without_bad(), self.second.without_bad()) if self.bad else self

    def digests(self, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        chosen = np.asarray(indices, dtype=np.int64)
        digests = [b""] * len(chosen)
        for source, offset, at in self._parts(chosen):
            for position, digest in zip(at.tolist(), source.digests(chosen[at] - offset), strict=True):
                digests[position] = digest
        return digests

    def _parts(self, indices: NDArray[np.int64]) -> list[tuple[ViewSource, int, NDArray[np.int64]]]:
        """Return both sources, the index of their first image here, and where in ``indices`` theirs are."""
        count = len(self.first.split)
        in_first = indices < count
        return [(self.first, 0, np.flatnonzero(in_first)), (self.second, count, np.flatnonzero(~in_first))]
