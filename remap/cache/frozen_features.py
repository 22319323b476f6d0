"""Frozen features of the student: the results of its frozen beginning for images whose view never changes."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from remap.cache.passes import run_in_passes
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
        with_images: Return them nevertheless, because a teacher reads each batch.
    """

    with_images: bool = False

    def __init__(self, network: Network, source: ViewSource, accelerator: Accelerator, *, bf16: bool) -> None:
        assert network.attached.seam is not None
        self.source, self.split, self.device = source, source.split, accelerator.device
        self._accelerator = accelerator
        self._seam = network.attached.seam
        self._runner = Runner(network, bf16=bf16)
        # The stem alone is run here, and none of the blocks whose signals the tap captures.
        self._runner.tap.close()
        self._features: dict[str, Tensor] = {}
        self._readable = np.zeros(len(source.split), dtype=bool)

    def bytes_per_image(self) -> int:
        """Return the memory that ``compute`` takes for each image."""
        # One black image on the device: shapes and types follow from the model, and no image has to be read.
        self._runner.model.eval()
        features = self._runner.stem(torch.zeros(1, *self.source.view.shape, dtype=torch.uint8, device=self.device))
        return sum(value.nbytes for value in features.values())

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._features.values())

    def compute(self, batch_size: int, at_once: int, progress: Progress, what: str) -> None:
        """Run the stem over all images, in eval mode, each process over its share; then all hold all of them.

        Args:
            batch_size: Images that are read, and sent to the other processes, together.
            at_once: Images of one pass (``run_in_passes``); 0 for all that are read together.
        """
        self._runner.model.eval()
        count = len(self.split)

        def stem(images: Tensor) -> Mapping[str, Tensor]:
            return self._runner.stem(images.to(self.device))

        def load(indices: NDArray[np.int64] | None) -> tuple[Tensor, NDArray[np.int64]]:
            return self.source.batch(np.arange(0) if indices is None else indices)

        def compute(images: Tensor) -> dict[str, Tensor]:
            return run_in_passes(stem, images, at_once or len(images) or 1)

        def check_signals() -> None:
            raise_if_interrupted(self._accelerator, "frozen features were being computed")

        # A signal waits for the end of a round: a process that left in the middle would leave the others waiting.
        with defer_signals(), progress.wait(f"frozen features of {what}", count) as step:
            chunks = index_chunks(count, batch_size)
            gathered = compute_and_gather(self._accelerator, chunks, load, compute, check_signals)
            for indices, readable, features in gathered:
                for name, value in features.items():
                    rows = self._features.setdefault(name, torch.zeros(count, *value.shape[1:], dtype=value.dtype))
                    # On the CPU, where there is room; a batch of them goes to the device when it is needed.
                    rows[torch.from_numpy(readable)] = value.cpu()
                self._readable[readable] = True
                step.advance(len(indices))

    def rows(self, indices_B: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return the features of some images, on the device."""
        rows = torch.from_numpy(indices_B)
        return {name: value[rows].to(self.device, non_blocking=True) for name, value in self._features.items()}

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """As ``ViewSource.batch``."""
        chosen = np.asarray(indices, dtype=np.int64)
        readable = chosen[self._readable[chosen]]
        if self.with_images or self._seam.reads_images:
            return self.source.batch(readable)
        # Decoding is most of the work of an epoch on frozen features, so images are not even read.
        return torch.zeros(len(readable), self.source.view.shape[0], 0, 0, dtype=torch.uint8), readable
