"""Accuracy with the exact number of images, on any number of processes."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from remap.data.views import ViewSource, require_readable
from remap.engine.features import FrozenFeatures
from remap.engine.interrupt import deferred, leave_if_asked
from remap.engine.launch import use_bf16
from remap.engine.processes import largest
from remap.engine.sharding import is_sharded
from remap.network import Network, Runner
from remap.progress import Progress
from remap.recipe.schema import Recipe


@dataclass(frozen=True)
class Evaluation:
    """Counts of one pass over a split; ``predictions_N`` holds the class of each image, -1 where it was left out."""

    correct: int
    count: int
    predictions_N: np.ndarray

    @property
    def accuracy(self) -> float:
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
        features: The network's frozen features of ``source``, where they are kept.

    Raises:
        DataError: An image cannot be read and ``skip_bad`` is off.
    """
    network.model.eval()
    runner = Runner(network, bf16=bf16)
    predictions = torch.full((len(source.split),), -1, dtype=torch.int64, device=accelerator.device)
    rounds = range(0, len(source.split), batch_size * accelerator.num_processes)
    with deferred(), progress.wait(f"evaluating {what}", len(rounds)) as step:
        for first in rounds:  # the same number on every process, so that they can leave together
            leave_if_asked(accelerator, f"{what} was being evaluated")
            start = first + batch_size * accelerator.process_index
            images, good = (features or source).batch(np.arange(start, min(start + batch_size, len(source.split))))
            require_readable(source, what, skip_bad)
            shown = good
            if not len(good) and is_sharded(network):  # the other processes need this one in their forward pass
                images, shown = images.new_zeros(1, *images.shape[1:]), np.zeros(1, dtype=np.int64)
            if len(shown):
                kept = features.rows(shown) if features is not None else None
                logits = runner(images.to(accelerator.device), kept).logits_BC
                predictions[torch.from_numpy(good)] = logits.argmax(dim=-1)[: len(good)]
            step.advance()
    runner.tap.close()
    found = largest(accelerator, predictions).cpu().numpy()  # one process has each image, the others -1
    seen = found >= 0
    return Evaluation(int((found == source.split.labels)[seen].sum()), int(seen.sum()), found)


def evaluate_as(
    recipe: Recipe,
    network: Network,
    source: ViewSource,
    accelerator: Accelerator,
    progress: Progress,
    what: str,
    features: FrozenFeatures | None = None,
) -> Evaluation:
    """``evaluate`` with a recipe's batch size, precision and rule for unreadable images."""
    return evaluate(
        network,
        source,
        accelerator,
        batch_size=max(64, recipe.train.batch_size),
        bf16=use_bf16(recipe.train.precision, accelerator.device),
        progress=progress,
        what=what,
        skip_bad=recipe.data.skip_bad,
        features=features,
    )
