"""Frozen features of the student: what its frozen beginning makes of images whose view never changes."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from remap.data.batches import in_passes
from remap.data.views import ViewSource
from remap.distributed.collectives import compute_and_gather, index_chunks
from remap.distributed.interrupts import defer_signals, raise_if_interrupted
from remap.network import Network, Runner
from remap.progress import Progress


class FrozenFeatures:
    """The stem's results (``remap.tuning.seam``) for all images of one source, computed once.

    It stands in for the source in training and evaluation: ``split`` and ``batch`` are those of the source, except
    that images are left out (zero pixels) where the rest of the network does not read them.

    Attributes:
        with_images: Give them all the same: a teacher looks at each batch.
    """

    with_images: bool = False

    def __init__(self, network: Network, source: ViewSource, accelerator: Accelerator, *, bf16: bool) -> None:
        assert network.attached.seam is not None
        self.source, self.split, self.device = source, source.split, accelerator.device
        self._accelerator = accelerator
        self._seam = network.attached.seam
        self._runner = Runner(network, bf16=bf16)
        self._runner.tap.close()  # the stem is run past its hooks
        self._kept: dict[str, Tensor] = {}
        self._good = np.zeros(len(source.split), dtype=bool)

    def bytes_per_image(self) -> int:
        """Memory that ``compute`` takes for each image."""
        self._runner.model.eval()
        size = self.source.view.size
        found = self._runner.stem(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.device))
        return sum(value.numel() * value.element_size() for value in found.values())

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self._kept.values())

    def compute(self, batch_size: int, at_once: int, progress: Progress, what: str) -> None:
        """Run the stem over all images, in eval mode, each process over its share; then all hold all of them.

        Args:
            batch_size: Images that are read, and sent to the other processes, together.
            at_once: Images of one pass, of exactly so many (``in_passes``); 0 for all that are read together.
        """
        self._runner.model.eval()
        count = len(self.split)

        def stem(images: Tensor) -> Mapping[str, Tensor]:
            return self._runner.stem(images.to(self.device))

        def compute(indices: np.ndarray | None) -> tuple[np.ndarray, dict[str, Tensor]]:
            images, good = self.source.batch(np.arange(0) if indices is None else indices)
            return good, in_passes(stem, images, at_once or len(good) or 1)

        def look() -> None:
            raise_if_interrupted(self._accelerator, "frozen features were being computed")

        with defer_signals(), progress.wait(f"frozen features of {what}", count) as step:
            chunks = index_chunks(count, batch_size)
            for indices, good, found in compute_and_gather(self._accelerator, chunks, compute, look):
                for key, value in found.items():
                    rows = self._kept.setdefault(key, torch.zeros(count, *value.shape[1:], dtype=value.dtype))
                    rows[torch.from_numpy(good)] = value.cpu()
                self._good[good] = True
                step.advance(len(indices))

    def rows(self, indices_B: np.ndarray) -> dict[str, Tensor]:
        """The features of some images, on the device."""
        rows = torch.from_numpy(indices_B)
        return {key: value[rows].to(self.device, non_blocking=True) for key, value in self._kept.items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, np.ndarray]:
        """As ``ViewSource.batch``."""
        chosen = np.asarray(indices, dtype=np.int64)
        good = chosen[self._good[chosen]]
        if self.with_images or self._seam.reads_images:
            return self.source.batch(good)
        return torch.zeros(len(good), 3, 0, 0, dtype=torch.uint8), good
