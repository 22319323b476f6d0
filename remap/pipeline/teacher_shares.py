"""Which teacher answers which training images: one all of them, or with ``teacher.folds`` each its fold."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from remap.cache.teacher_cache import FiniteViews, InMemory
from remap.distributed.launch import accelerator
from remap.engine.teacher import Teacher
from remap.network import Network
from remap.pipeline.components import RunComponents
from remap.pipeline.computed_once import digest_of_network
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.progress import Progress


@dataclass(frozen=True)
class Share:
    """Training images that one teacher answers.

    Attributes:
        fold: Its number, from 1; 0 is the teacher of all labels, for images that no fold has.
        fingerprint: Equal for teachers with equal outputs.
    """

    fold: int
    teacher: Teacher
    fingerprint: str
    views: FiniteViews


def finite_views(components: RunComponents) -> FiniteViews:
    """Return all views of all training images, where they are finite."""
    recipe = components.recipe
    return FiniteViews(components.training_source, recipe.data.augmentation, recipe.seed, recipe.finite_views)


def frozen_teacher(components: RunComponents, network: Network, number: int) -> Teacher:
    """Return a frozen network as one of the objective's teachers."""
    return Teacher(network, components.objective, number, accelerator(), bf16=components.bf16)


def fold_of_images(components: RunComponents, prepared: PreparedTeacher) -> NDArray[np.int64]:
    """Return which fold's teacher answers each training image (N,); 0 is the teacher of all labels."""
    fold_N = np.zeros(len(components.training_source.split), dtype=np.int64)
    if prepared.folds is not None:  # labelled images come first
        of_labeled = prepared.folds.fold_of_N
        fold_N[: len(of_labeled)] = of_labeled
    return fold_N


def shares(
    components: RunComponents, teacher: Teacher, prepared: PreparedTeacher, progress: Progress
) -> Iterator[Share]:
    """Yield who answers which images, one after the other: each teacher is there until the next one is wanted."""
    views, fold_N = finite_views(components), fold_of_images(components, prepared)
    if not fold_N.any():
        yield Share(0, teacher, prepared.fingerprint, views)
        return
    for fold in np.unique(fold_N).tolist():
        some = replace(views, chosen=np.flatnonzero(fold_N == fold))
        if fold == 0:
            yield Share(0, teacher, prepared.fingerprint, some)
            continue
        assert prepared.folds is not None
        with prepared.folds.opened(fold, progress) as network:
            fingerprint = digest_of_network(network)
            if network is teacher.network:  # with another head
                yield Share(fold, teacher, fingerprint, some)
                continue
            own = frozen_teacher(components, network, teacher.number)
            if components.bf16:
                own.hold_bf16()
            yield Share(fold, own, fingerprint, some)
            own.close()


def known_outputs(
    components: RunComponents,
    prepared: PreparedTeacher,
    names: set[str],
    views: FiniteViews,
    found: InMemory | None = None,
) -> InMemory | None:
    """Return the outputs that fitting the teacher's head has given already, added to those of other images."""
    if prepared.one_pass is None:
        return None
    sizes = components.process_images, components.pass_images
    return prepared.one_pass.outputs(names, views, *sizes, components.bf16, found)
