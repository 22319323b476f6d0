"""Accuracy with the exact number of images, on any number of processes."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from remap.cache.frozen_features import FrozenFeatures
from remap.data.views import ViewSource, require_readable
from remap.distributed.collectives import all_reduce_max, all_reduce_max_, index_chunks, rounds_of_chunks
from remap.distributed.device_memory import is_out_of_memory
from remap.distributed.interrupts import defer_signals, raise_if_interrupted
from remap.distributed.launch import ProcessLost, use_bf16
from remap.distributed.sharding import is_sharded
from remap.network import Network, Runner
from remap.progress import Progress
from remap.recipe.schema import Recipe


@dataclass(frozen=True)
class Evaluation:
    """Counts of one pass over a split.

    Attributes:
        predictions_N: The class of each image, -1 where it was left out.
    """

    correct: int
    count: int
    predictions_N: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of correct answers, from 0 to 1."""
        return self.correct / self.count if self.count else 0.0


@torch.no_grad()
def evaluate(
    network: Network,
    source: ViewSource,
    accelerator: Accelerator,
    *,
    batch_size: int,
    bf16: bool,
    progress: Progress,
    what: str,
    skip_bad: bool = False,
    features: FrozenFeatures | None = None,
) -> Evaluation:
    """Evaluate in eval mode; every process takes each n-th batch and the counts are added up.

    Args:
        what: Whose accuracy this is, for messages.
        features: The network's frozen features of ``source``, where they are cached.

    Raises:
        DataError: An image cannot be read and ``skip_bad`` is off.
    """
    # The student comes back from a training step; the next epoch puts it into train mode.
    network.model.eval()
    runner = Runner(network, bf16=bf16)
    try:
        with defer_signals():
            one_pass = _Pass(network, runner, source, features, accelerator, progress, what, skip_bad)
            while (predictions := one_pass.run(batch_size)) is None:
                batch_size //= 2  # from the start: the counts of the failed pass are thrown away
                progress.say(f"out of memory: {what} is evaluated in batches of {batch_size}")
    finally:
        runner.tap.close()
    # Exactly one process has the class of each image, the others -1.
    classes = all_reduce_max_(accelerator, predictions).cpu().numpy()
    seen = classes >= 0
    return Evaluation(int((classes == source.split.labels)[seen].sum()), int(seen.sum()), classes)


@dataclass(frozen=True)
class _Pass:
    """One pass over a split, each process taking every n-th batch.

    All do the same number of rounds, and agree in each on how it went, so that none waits for one that has left.
    """

    network: Network
    runner: Runner
    source: ViewSource
    features: FrozenFeatures | None
    accelerator: Accelerator
    progress: Progress
    what: str
    skip_bad: bool

    def run(self, batch_size: int) -> Tensor | None:
        """Return the class of each image (N,), -1 for those of other processes; None where memory ran out."""
        classes = torch.full((len(self.source.split),), -1, dtype=torch.int64, device=self.accelerator.device)
        # Whole chunks go to processes, so that each pass has the same shape on any number of them.
        chunks = index_chunks(len(classes), batch_size)
        with self.progress.wait(f"evaluating {self.what}", -(-len(chunks) // self.accelerator.num_processes)) as step:
            for _, chunk in rounds_of_chunks(self.accelerator, chunks):
                raise_if_interrupted(self.accelerator, f"{self.what} was being evaluated")
                indices = np.arange(0) if chunk is None else chunk
                out_of_memory = self._classify(indices, classes, batch_size > 1)
                unreadable = bool(self.source.bad) and not self.skip_bad
                any_out_of_memory, any_unreadable = all_reduce_max(self.accelerator, out_of_memory, unreadable)
                if any_unreadable:  # on all processes at once, or the others would wait for the one that raises
                    require_readable(self.source, self.what, self.skip_bad)
                    raise ProcessLost(f"another process cannot read one of the {self.what} images")
                if any_out_of_memory:
                    clear_device_cache(garbage_collection=True)
                    return None
                step.advance()
        return classes

    def _classify(self, indices: np.ndarray, classes: Tensor, may_shrink: bool) -> bool:
        """Fill in the classes of some images; return whether memory ran out instead."""
        images, readable = (self.features or self.source).batch(indices)
        shown = readable
        if not len(readable) and is_sharded(self.network):
            # The other processes need this one in their forward pass, so it runs on a black image.
            images, shown = images.new_zeros(1, *images.shape[1:]), np.zeros(1, dtype=np.int64)
        if not len(shown):
            return False
        try:
            rows = self.features.rows(shown) if self.features is not None else None
            logits = self.runner(images.to(self.accelerator.device), rows).logits_BC
        except (RuntimeError, MemoryError) as error:
            # With sharded weights the other processes are in the middle of the pass that failed here.
            if not is_out_of_memory(error) or not may_shrink or is_sharded(self.network):
                raise
            return True
        classes[torch.from_numpy(readable)] = logits.argmax(dim=-1)[: len(readable)]
        return False


def batch_size_of_evaluation(recipe: Recipe) -> int:
    """Return the batch size of evaluation: without gradients there is room for more images."""
    return max(64, recipe.train.batch_size)


def evaluate_as(
    recipe: Recipe,
    network: Network,
    source: ViewSource,
    accelerator: Accelerator,
    progress: Progress,
    what: str,
    features: FrozenFeatures | None = None,
) -> Evaluation:
    """Run ``evaluate`` with a recipe's batch size, precision and rule for unreadable images."""
    return evaluate(
        network,
        source,
        accelerator,
        batch_size=batch_size_of_evaluation(recipe),
        bf16=use_bf16(recipe.train.precision, accelerator.device),
        progress=progress,
        what=what,
        skip_bad=recipe.data.skip_bad,
        features=features,
    )
