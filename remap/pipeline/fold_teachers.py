"""Teachers of images that they were not prepared on: one for each fold of the labelled images (cross-fitting).

Dao et al. 2021, arXiv 2104.09732, section 4: a teacher that was tuned on an image is surer of its label than it is of
another image's, and its student learns that. Teacher i is prepared without fold i, and answers that fold alone. All
other images are answered by the teacher that was prepared on all labels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remap.data.stratify import folds, without_fold
from remap.distributed.launch import accelerator
from remap.network import Network, frozen
from remap.pipeline.adjusting import adjust_logits
from remap.pipeline.computed_once import digest_of_network
from remap.pipeline.data_views import DataViews
from remap.pipeline.fit_head import LabeledFeatures, fit_head
from remap.pipeline.shared import SharedResources
from remap.pipeline.stored_teacher import PROBE
from remap.pipeline.teacher_tuning import (
    data_of_teacher,
    fold_folder,
    is_prepared,
    require_several_folds,
    title_of,
    tuned_key,
)
from remap.progress import Progress
from remap.recipe.schema import Recipe, TeacherSpec
from remap.runs.task import load_task, put_task
from remap.runs.task_file import folder_of, read_meta


@dataclass
class FoldTeachers:
    """The teachers of all folds, as tasks on the disk: one of those that were tuned is in memory at a time.

    Attributes:
        fold_of_N: The fold of each labelled training image that can be read, from 1.
        folders: Task folders, in the order of the folds.
        network: The teacher of all labels; where heads were fitted, the one network that each of them is put into.
        placed: Moves a network to the device.
        heads: Fitted classifiers as the recipe changes them, in the order of the folds; none where they were tuned.
    """

    recipe: Recipe
    spec: TeacherSpec
    views: DataViews
    shared: SharedResources
    folders: tuple[Path, ...]
    network: Network
    placed: Callable[[Network], Network]
    heads: tuple[dict[str, Tensor], ...] = ()
    _fingerprints: dict[int, str] = field(default_factory=dict)

    @property
    def fold_of_N(self) -> NDArray[np.int64]:
        assert self.spec.folds is not None
        # Of all labels, so that an image that cannot be read moves no other to another fold.
        return folds(self.views.data.train.labels, self.spec.folds)[self.views.readable] + 1

    @property
    def digest(self) -> str:
        """Return a hash for each task."""
        return " ".join(read_meta(folder_of(folder)).sha256 for folder in self.folders)

    def fingerprint(self, fold: int, progress: Progress) -> str:
        """Return a hash that is equal for teachers of folds with equal outputs."""
        if fold not in self._fingerprints:
            with self.opened(fold, progress) as network:
                self._fingerprints[fold] = digest_of_network(network)
        return self._fingerprints[fold]

    @contextmanager
    def opened(self, fold: int, progress: Progress) -> Iterator[Network]:
        """Give the teacher of a fold, from 1, until the block ends."""
        if self.heads:
            with holding_head(self.network):
                _put_head(self.network, self.heads[fold - 1])
                yield self.network
        else:
            network = frozen(self.placed(load_task(self.folders[fold - 1])[0]))
            self._adjust(network, fold, progress)
            yield network

    def read_heads(self, progress: Progress) -> None:
        """Read the fitted heads, before the network is prepared for training, which may round its weights."""
        heads = []
        with holding_head(self.network):
            for fold, folder in enumerate(self.folders, 1):
                put_task(self.network, folder)
                self._adjust(self.network, fold, progress)
                heads.append(_head(self.network))
        self.heads = tuple(heads)

    def _adjust(self, network: Network, fold: int, progress: Progress) -> None:
        """Change its classifier as that of the teacher of all labels, by images outside of the fold."""
        if self.spec.adjusts_logits:
            part = self.shared.open(data_of_teacher(self.recipe, self.spec, fold), self.views.view, progress)
            source = part.train if self.views.unlabeled is None else self.views.unlabeled
            title, batch_size = title_of(self.spec, self.recipe, fold), self.recipe.train.batch_size
            adjust_logits(network, self.spec, title, source, part.val, batch_size, progress)


@contextmanager
def holding_head(network: Network) -> Iterator[None]:
    """Give a network its classifier back when the block ends."""
    held = _head(network)
    try:
        yield
    finally:
        _put_head(network, held)


def _head(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.tensors.items() if network.anatomy.is_head(name)}


@torch.no_grad()
def _put_head(network: Network, head: dict[str, Tensor]) -> None:
    tensors = network.tensors
    for name, tensor in head.items():
        tensors[name].copy_(tensor)


def prepare_folds(
    network: Network,
    spec: TeacherSpec,
    recipe: Recipe,
    folder: Path,
    views: DataViews,
    progress: Progress,
    shared: SharedResources,
    features: LabeledFeatures,
    placed: Callable[[Network], Network],
) -> FoldTeachers:
    """Return the teachers of all folds; heads that are not stored yet are fitted, on features that are computed once.

    Args:
        network: The teacher of all labels.
        folder: Where that is stored; theirs are beside it.
        features: Of all labelled training images.

    Raises:
        DataError: The images of a class that can be read are all in one fold.
    """
    assert spec.folds is not None
    labels = views.data.train.labels
    what = "a class whose labelled images are all in one fold, as far as they can be read,"
    require_several_folds(views.data.classes, labels[views.readable], folds(labels, spec.folds)[views.readable], what)
    numbers = range(1, spec.folds + 1)
    folders = [fold_folder(folder, fold) for fold in numbers]
    if spec.prepare == PROBE:
        with holding_head(network):
            for fold, own in zip(numbers, folders, strict=True):
                if not is_prepared(own):
                    data = data_of_teacher(recipe, spec, fold)
                    part = shared.open(data, views.view, progress)
                    assert data.fold is not None
                    images, _ = without_fold(views.data.train.labels, fold - 1, spec.folds, data.fold.held_out)
                    fit_head(network, spec, recipe, own, part, progress, shared, features, fold, images)
        # As of the teacher of all labels: the main process makes the folders.
        accelerator().wait_for_everyone()
    else:  # tuned before this run, or by an earlier one
        folders = [shared.tuned_teachers[tuned_key(recipe, spec, fold)] for fold in numbers]
    found = FoldTeachers(recipe, spec, views, shared, tuple(folders), network, placed)
    if spec.prepare == PROBE:
        found.read_heads(progress)
    return found
