"""One pass of a frozen teacher over the training images: features for its head, and what losses read of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remap.backbones.anatomy import module_at
from remap.cache.passes import run_in_passes
from remap.cache.teacher_cache import FiniteViews, InMemory, cache_in_memory
from remap.distributed.launch import accelerator, use_bf16
from remap.distributed.sharding import is_sharded
from remap.engine.teacher import Teacher
from remap.network import Network
from remap.pipeline.data_views import DataViews
from remap.pipeline.objective import build_objective, pairs_of
from remap.progress import Progress
from remap.recipe.schema import EMA, DataSpec, Recipe
from remap.recipe.teacher_checks import what_changes
from remap.remapping.objective import Objective
from remap.remapping.signals import Needs, Signals
from remap.remapping.targets import LOGITS, POOLED, pooled_of


class _Headless(Teacher):
    """A teacher whose head is fitted later: gives the features that enter it, and what losses read besides logits.

    Attributes:
        exact: Whether the head alone made the very logits of the whole network so far.
    """

    exact = True

    @torch.no_grad()
    def items(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        signals = self.runner(images_BCHW.to(self.device))
        found = self.objective.targets(signals, self.number) | pooled_of(signals)
        # Every batch is compared, bit for bit: one that differs costs a second pass instead of other outputs.
        self.exact = self.exact and torch.equal(self.logits(found[POOLED]), signals.logits_BC)
        return found

    @torch.no_grad()
    def logits(self, pooled_BD: Tensor) -> Tensor:
        """Return what the network makes of the features that enter its classifier."""
        head = module_at(self.network.model, self.network.anatomy.classifier_heads[0])
        # As `Runner` runs the whole network, or the last bits would be others.
        with torch.autocast(pooled_BD.device.type, torch.bfloat16, enabled=self.runner.bf16):
            return head(pooled_BD)


@dataclass
class OnePass:
    """What one pass over the training images gave, before the teacher had its head.

    Attributes:
        of_logits: The losses that read logits; they follow from the features once the head is fitted.
        rows: The features, and what other losses read.
        batch: Images of each pass, which may decide the last bits.
    """

    teacher: _Headless
    of_logits: Objective
    views: FiniteViews
    batch: int
    rows: InMemory

    def features(self, images: DataViews) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of the labelled images, float64 (N, D), and which of them can be read (N,)."""
        readable = self.rows.readable()
        # Labelled images come first in the training source.
        labeled = readable[readable < len(images.train.split)]
        return self.rows.rows(labeled, 0)[POOLED].double().numpy(), labeled

    def outputs(
        self, names: set[str], views: FiniteViews, batch: int, at_once: int, bf16: bool, found: InMemory | None = None
    ) -> InMemory | None:
        """Return what ``cache_in_memory`` would, to the last bit; None where it is not this pass that is wanted.

        Args:
            found: What it returned for other images of the same source, to be completed.
        """
        same = views.source is self.views.source and (batch, at_once) == (self.batch, self.batch)
        as_asked = bf16 == self.teacher.runner.bf16 and not self.teacher.at_once  # else memory ran out
        if not (same and as_asked and self.teacher.exact):
            return None
        found = self.rows.only(names) if found is None else found
        count, readable = len(views.source.split), self.rows.readable()
        for _, chunk in views.chunks(batch):
            indices = np.intersect1d(chunk, readable)
            if len(indices):
                pooled_BD = self.rows.rows(indices, 0)[POOLED].to(self.teacher.device)
                found.put(0, indices, run_in_passes(self._of_logits, pooled_BD, batch), count)
        # A loss may read what neither half gave; then the caller computes all of it.
        return found if set(found.rows(readable[:1], 0)) == names else None

    def _of_logits(self, pooled_BD: Tensor) -> dict[str, Tensor]:
        return self.of_logits.targets(Signals(self.teacher.logits(pooled_BD), pooled_BD), self.teacher.number)


def run_once(
    recipe: Recipe, views: DataViews, student: Network, teachers: list[Network], number: int, progress: Progress
) -> OnePass | None:
    """Run a teacher, whose head is about to be fitted, over the training images.

    None where that would not save a pass: outputs are not cached, the student sees other images than the head is fitted
    on, or logits are not what one layer makes of the features.
    """
    network, data = teachers[number], recipe.data
    source, batch = views.training_source, min(recipe.train.batch_size, len(views.training_source.split))
    objectives = objectives_of_one_pass(recipe, student, teachers, number)
    if objectives is None:
        return None
    silent, of_logits = objectives
    bf16 = use_bf16(recipe.train.precision, accelerator().device)
    network.model.eval()
    teacher = _Headless(network, silent, number, accelerator(), bf16=bf16, needs=Needs(pooled=True))
    try:
        # By one black image, which sets `exact` too: a network that does not fit is found before the pass.
        shapes = teacher.shapes(views.view.shape)
        if LOGITS in shapes or not teacher.exact or not fits_in_memory(shapes, views, data):
            return None
        wanted = FiniteViews(source, data.augmentation, recipe.seed, 1)
        rows = cache_in_memory(teacher, wanted, batch, batch, accelerator(), progress)
    finally:
        # Hooks would stay on a network that other passes use; `logits` runs its head without them.
        teacher.close()
    return OnePass(teacher, of_logits, wanted, batch, rows)


def objectives_of_one_pass(
    recipe: Recipe, student: Network, teachers: list[Network], number: int
) -> tuple[Objective, Objective] | None:
    """Return the losses that read no logits and those that do, where one pass serves the head and both; else None."""
    spec, network, data = recipe.teachers[number], teachers[number], recipe.data
    once = data.augment == "none" and not data.unlabeled_only and recipe.train.accumulation == 1
    once = once and not spec.adjusts_logits
    cached = spec.cache != "off" and what_changes(spec, data) is None
    alone = accelerator().num_processes == 1 and not is_sharded(network)
    if not (once and cached and alone) or any(one.model == EMA for one in recipe.teachers):
        return None
    # `_Headless.logits` runs the first classifier alone, whose logits are not those of the network then.
    if len(network.anatomy.classifier_heads) > 1:
        return None
    with torch.random.fork_rng(devices=[]):
        # Losses draw projectors: in a fork, so that those of the run are drawn as without this pass.
        torch.manual_seed(recipe.seed)
        silent, of_logits = (_objective(recipe, student, teachers, reads) for reads in (False, True))
    # A loss that reads logits and more than the features does not follow from the features alone.
    needs = of_logits.teacher_needs(number) | Needs(pooled=True)
    return (silent, of_logits) if needs == Needs(pooled=True) else None


def fits_in_memory(shapes: Mapping[str, Sequence[int]], views: DataViews, data: DataSpec) -> bool:
    """Return whether outputs of these shapes, float32, of all images that the student learns from fit in memory."""
    each = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    return len(views.training_source.split) * each <= data.memory_gib * 2**30


def _objective(recipe: Recipe, student: Network, teachers: list[Network], reads_logits: bool) -> Objective:
    losses = tuple(loss for loss in recipe.losses if loss.reads_logits == reads_logits)
    objective = build_objective(recipe.model_copy(update={"losses": losses}), pairs_of(student, teachers))
    return objective.to(accelerator().device)
