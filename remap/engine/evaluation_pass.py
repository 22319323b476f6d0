"""Accuracy with the exact number of images, on any number of processes."""

from dataclasses import dataclass

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
from remap.distributed.launch import ProcessLost, accelerator, use_bf16
from remap.distributed.sharding import is_sharded
from remap.engine.evaluation import ClassScoring, Evaluation, Scoring
from remap.engine.multilabel import SetScoring
from remap.network import Network, Runner
from remap.progress import Progress
from remap.recipe.schema import Recipe


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
    images: str = "evaluation",
) -> Evaluation:
    """Evaluate in eval mode; every process takes each n-th batch and the counts are added up.

    Args:
        what: Whose accuracy this is, for messages.
        features: The network's frozen features of ``source``, where they are cached.
        images: Which images these are, for messages.

    Raises:
        DataError: An image cannot be read and ``skip_bad`` is off.
    """
    # The student comes back from a training step; the next epoch puts it into train mode.
    network.model.eval()
    runner = Runner(network, bf16=bf16)
    scoring = ClassScoring() if source.split.labels.ndim == 1 else SetScoring()
    try:
        # A process that left in the middle of a round would leave the others waiting: ``run`` looks between rounds.
        with defer_signals():
            one_pass = _Pass(network, runner, scoring, source, features, accelerator, progress, what, images, skip_bad)
            while (answers := one_pass.run(batch_size)) is None:
                batch_size //= 2  # from the start: the counts of the failed pass are thrown away
                progress.say(f"out of memory: {what} is evaluated in batches of {batch_size}")
    finally:
        runner.tap.close()  # else its hooks would stay on a network that is trained further
    # Exactly one process has the answers for each image, the others the blank.
    whole = tuple(all_reduce_max_(accelerator, rows).cpu().numpy() for rows in answers)
    return scoring.evaluation(whole, source.split.labels)


@dataclass(frozen=True)
class _Pass:
    """One pass over a split, each process taking every n-th batch.

    All do the same number of rounds, and agree in each on how it went, so that none waits for one that has left.
    """

    network: Network
    runner: Runner
    scoring: Scoring
    source: ViewSource
    features: FrozenFeatures | None
    accelerator: Accelerator
    progress: Progress
    what: str
    images: str
    skip_bad: bool

    def run(self, batch_size: int) -> tuple[Tensor, ...] | None:
        """Return what is kept of each image, the blank for those of other processes; None where memory ran out."""
        count, classes = len(self.source.split), len(self.network.classes or ())
        answers = self.scoring.blank(count, classes, self.accelerator.device)
        # Whole chunks go to processes, so that each pass has the same shape on any number of them.
        chunks = index_chunks(count, batch_size)
        with self.progress.wait(f"evaluating {self.what}", -(-len(chunks) // self.accelerator.num_processes)) as step:
            rounds = rounds_of_chunks(self.accelerator, chunks)
            for _, (images, readable) in made_ahead(self._read, rounds):
                raise_if_interrupted(self.accelerator, f"{self.what} was being evaluated")
                out_of_memory = self._classify(images, readable, answers, batch_size > 1)
                unreadable = bool(self.source.bad) and not self.skip_bad
                any_out_of_memory, any_unreadable = all_reduce_max(self.accelerator, out_of_memory, unreadable)
                if any_unreadable:  # on all processes at once, or the others would wait for the one that raises
                    require_readable(self.source, self.images, self.skip_bad)  # raises where this process is the one
                    raise ProcessLost(f"another process cannot read one of the {self.images} images")
                if any_out_of_memory:
                    # Fragments of the failed pass would make the smaller one fail too.
                    clear_device_cache(garbage_collection=True)
                    return None
                step.advance()
        return answers

    def _read(self, of_round: tuple[object, np.ndarray | None]) -> tuple[Tensor, np.ndarray]:
        """Return the images of this process's chunk of a round, and which of them could be read."""
        chunk = of_round[1]
        return (self.features or self.source).batch(np.arange(0) if chunk is None else chunk)

    def _classify(self, images: Tensor, readable: np.ndarray, answers: tuple[Tensor, ...], may_shrink: bool) -> bool:
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
        at_B, labels = torch.from_numpy(readable), torch.from_numpy(self.source.split.labels[readable])
        # Without the row of the black image; in float32, as bf16 would round probabilities to 8 bits.
        kept = self.scoring.of(logits[: len(readable)].float(), labels.to(logits.device))
        for answer, part in zip(answers, kept, strict=True):
            answer[:, at_B] = part
        return False


def batch_size_of_evaluation(recipe: Recipe) -> int:
    """Return the batch size of evaluation: without gradients there is room for more images."""
    return max(64, recipe.train.batch_size)


def evaluate_as(
    recipe: Recipe,
    network: Network,
    source: ViewSource,
    progress: Progress,
    what: str,
    features: FrozenFeatures | None = None,
) -> Evaluation:
    """Run ``evaluate`` with a recipe's batch size, precision and rule for unreadable images."""
    return evaluate(
        network,
        source,
        accelerator(),
        batch_size=batch_size_of_evaluation(recipe),
        bf16=use_bf16(recipe.train.precision, accelerator().device),
        progress=progress,
        what=what,
        skip_bad=recipe.data.skip_bad,
        features=features,
    )
