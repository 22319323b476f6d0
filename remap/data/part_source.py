"""The views of some images of a source as those of a source of their own."""

from collections.abc import Mapping, Sequence

import numpy as np
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
