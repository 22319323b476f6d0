"""Cached features of the student's frozen beginning: when they can be cached, what that takes, and computing them."""

import time

from remap.cache.frozen_features import FrozenFeatures
from remap.data.views import ViewSource
from remap.distributed.launch import accelerator
from remap.engine.evaluation_pass import batch_size_of_evaluation
from remap.io.human_size import duration, size
from remap.pipeline.components import RunComponents
from remap.pipeline.shared import SharedResources
from remap.progress import Progress


def cache_features(components: RunComponents, progress: Progress, shared: SharedResources) -> dict[str, FrozenFeatures]:
    """Return the student's frozen features of images, by "train", "val" and "selection", where there are any.

    Computed once for runs one after the other with the same student, method and images, as a run and its baseline are.
    Empty where the method changes the network from its first layer on, where views change, where a loss reads
    attention inside the frozen part, or where memory does not suffice.
    """
    needed = feature_bytes(components)
    if needed is None:
        return {}
    if needed > components.recipe.data.memory_gib * 2**30:
        progress.say(f"frozen features are not cached: they would take {needed / 2**30:.1f} GiB (data.memory_gib)")
        return {}
    recipe, student = components.recipe, components.student
    # Of images by their object: shared views stay in memory. The size of a pass may decide the last bits.
    key = (
        *(student.identity.sha256, recipe.method.model_dump_json(), components.bf16),
        *(id(components.training_source), *map(id, _evaluated(components).values())),
        *(components.process_images, components.pass_images),
    )
    if key in shared.features:
        return shared.features[key]
    started = time.perf_counter()
    train = _features(components, components.training_source)
    others = {name: _features(components, source) for name, source in _evaluated(components).items()}
    # In the shapes of training and of evaluation: the last bits of a matrix product may depend on its shape.
    train.compute(components.process_images, components.pass_images, progress, "training images")
    if components.judges:  # without a classifier, features are judged behind the last block
        for name, title in (("val", "evaluation images"), ("selection", "selection images")):
            if name in others:
                others[name].compute(batch_size_of_evaluation(components.recipe), 0, progress, title)
    count = sum(len(one.split) for one in (train, *others.values()))
    progress.say(
        f"cached frozen features of {count} images: {size(needed)} in {duration(time.perf_counter() - started)}"
    )
    shared.features = {key: {"train": train, **others}}  # the newest alone: they may take all the memory there is
    return shared.features[key]


def feature_bytes(components: RunComponents) -> int | None:
    """Return what caching the frozen features of all images takes; None where they cannot be cached."""
    seam, data, depth = components.student.attached.seam, components.recipe.data, components.student.anatomy.depth
    # Augmented images change in every epoch, and with them their features. Without steps they are read once.
    if not components.recipe.train.by_steps or seam is None or data.augment != "none" or not data.finite_views:
        return None
    # Signals inside the frozen part come from its forward pass, and the last block's from the whole network.
    if any(index < seam.first_block or index == depth for index in components.objective.student_needs().blocks):
        return None
    each = _features(components, components.training_source).bytes_per_image()
    return each * sum(len(one.split) for one in (components.training_source, *_evaluated(components).values()))


def _evaluated(components: RunComponents) -> dict[str, ViewSource]:
    """Return the images that the student is evaluated on after each epoch."""
    views = components.views
    return {"val": views.val} | ({} if views.selection is None else {"selection": views.selection})


def _features(components: RunComponents, source: ViewSource) -> FrozenFeatures:
    return FrozenFeatures(components.student, source, accelerator(), bf16=components.bf16)
