"""Accuracy with the exact number of images, on any number of processes."""

from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from remap.cache.frozen_features import FrozenFeatures
from remap.data.thread_pool import made_ahead
from remap.data.views import ViewSource, require_readable
from remap.distributed.collectives import all_reduce_max, all_reduce_max_, index_chunks, rounds_of_chunks
from remap.distributed.device_memory import is_out_of_memory
from remap.distributed.interrupts import defer_signals, raise_if_interrupted
from remap.distributed.launch import ProcessLost, use_bf16
from remap.distributed.sharding import is_sharded
from remap.network import Network, Runner
from remap.progress import Progress
from remap.recipe.schema import Recipe

# The loss of an answer that is not a finite number.
MOST = 1e4


@dataclass(frozen=True)
class Evaluation:
    """Counts of one pass over a split, and of each image what all metrics are computed from; -1 where it was left out.

    Attributes:
        predictions_N: Its class as the network sees it.
        ranks_N: How many classes the network finds likelier than its label.
        confidences_N: Probability of the predicted class.
        losses_N: Cross-entropy, -log of its label's probability.
    """

    correct: int
    count: int
    predictions_N: np.ndarray
    ranks_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    confidences_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    losses_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def accuracy(self) -> float:
        """Share of correct answers, from 0 to 1."""
        return self.correct / self.count if self.count else 0.0

    @property
    def loss(self) -> float:
        """Mean cross-entropy; 0 where no image was read."""
        return float(self.losses_N[self.predictions_N >= 0].mean(dtype=np.float64)) if self.count else 0.0


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
            while (answers := one_pass.run(batch_size)) is None:
                batch_size //= 2  # from the start: the counts of the failed pass are thrown away
                progress.say(f"out of memory: {what} is evaluated in batches of {batch_size}")
    finally:
        runner.tap.close()
    # Exactly one process has the answers for each image, the others -1.
    whole_2N, real_2N = (all_reduce_max_(accelerator, rows).cpu().numpy() for rows in answers)
    classes, seen = whole_2N[0], whole_2N[0] >= 0
    return Evaluation(
        int((classes == source.split.labels)[seen].sum()), int(seen.sum()), classes, whole_2N[1], *real_2N
    )


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

    def run(self, batch_size: int) -> tuple[Tensor, Tensor] | None:
        """Return what ``Evaluation`` has of each image, -1 for those of other processes; None where memory ran out.

        Returns:
            Class and rank, int64 (2, N); confidence and loss, float32 (2, N).
        """
        shape, device = (2, len(self.source.split)), self.accelerator.device
        answers = torch.full(shape, -1, device=device), torch.full(shape, -1.0, dtype=torch.float32, device=device)
        # Whole chunks go to processes, so that each pass has the same shape on any number of them.
        chunks = index_chunks(shape[1], batch_size)
        with self.progress.wait(f"evaluating {self.what}", -(-len(chunks) // self.accelerator.num_processes)) as step:
            rounds = rounds_of_chunks(self.accelerator, chunks)
            for _, (images, readable) in made_ahead(self._read, rounds):
                raise_if_interrupted(self.accelerator, f"{self.what} was being evaluated")
                out_of_memory = self._classify(images, readable, answers, batch_size > 1)
                unreadable = bool(self.source.bad) and not self.skip_bad
                any_out_of_memory, any_unreadable = all_reduce_max(self.accelerator, out_of_memory, unreadable)
                if any_unreadable:  # on all processes at once, or the others would wait for the one that raises
                    require_readable(self.source, self.what, self.skip_bad)
                    raise ProcessLost(f"another process cannot read one of the {self.what} images")
                if any_out_of_memory:
                    clear_device_cache(garbage_collection=True)
                    return None
                step.advance()
        return answers

    def _read(self, of_round: tuple[object, np.ndarray | None]) -> tuple[Tensor, np.ndarray]:
        """Return the images of this process's chunk of a round, and which of them could be read."""
        chunk = of_round[1]
        return (self.features or self.source).batch(np.arange(0) if chunk is None else chunk)

    def _classify(self, images: Tensor, readable: np.ndarray, answers: tuple[Tensor, Tensor], may_shrink: bool) -> bool:
        """Fill in the answers for some images; return whether memory ran out instead."""
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
        at_B, logits_BC = torch.from_numpy(readable), logits[: len(readable)].float()
        labels_B1 = torch.from_numpy(self.source.split.labels[readable]).to(logits.device)[:, None]
        log_BC = logits_BC.log_softmax(dim=-1)
        losses_B1 = -log_BC.gather(1, labels_B1)
        ranks_B = (log_BC > -losses_B1).sum(dim=-1)
        # An answer that is not finite is as wrong as can be.
        scores_2B = torch.stack([log_BC.amax(dim=-1).exp().nan_to_num(0.0), losses_B1[:, 0].nan_to_num(MOST, MOST)])
        answers[0][:, at_B] = torch.stack([logits.argmax(dim=-1)[: len(readable)], ranks_B])
        answers[1][:, at_B] = scores_2B
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
