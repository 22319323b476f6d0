"""Training images for what looks at some before training: methods, weight initialisation, pruning."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from remap.backbones.build import Backbone
from remap.backbones.preprocess import Preprocess
from remap.data import keyed_random
from remap.data.views import ViewSource
from remap.distributed.launch import accelerator
from remap.errors import DataError
from remap.network import Network, Runner
from remap.pipeline.data_views import DataViews
from remap.pipeline.shared import SharedResources
from remap.recipe.schema import DataSpec
from remap.tuning.base import Sample

# How many images at once a method looks at before its first step (``Attached.prepare``).
METHOD_BATCH = 32


def method_sample(student: Network, views: DataViews, seed: int, *, everything: bool = False) -> Sample:
    """Return training images for a method that looks at some, or at everything; the same ones for a seed.

    They are labelled ones, unless the student learns without labels.
    """
    labeled = student.classes and len(views.train.split)
    source, preprocess = views.train if labeled else views.training_source, Runner(student).preprocess
    # Keyed by the seed, so that a resumed run and other processes see the same ones.
    count = len(source.split) if everything else student.attached.sample_images
    order = keyed_random.permutation(seed, 0, len(source.split))[:count]
    device = accelerator().device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(order), METHOD_BATCH):
            pixels, good = source.batch(order[start : start + METHOD_BATCH])
            if len(good):
                yield preprocess(pixels.to(device)), torch.from_numpy(source.split.labels[good]).to(device)

    return Sample(batches, len(student.classes or ()))


def training_pixels(
    backbone: Backbone,
    data: DataSpec,
    seed: int,
    shared: SharedResources,
    *,
    images: int,
    batch_size: int,
    without_images: str,
) -> Callable[[], Iterator[Tensor]]:
    """Return batches (B, 3, S, S) of training images as a backbone takes them; the same ones for a seed.

    They are labelled ones where there are any.

    Args:
        images: How many at most.
        without_images: The option that needs no images, for the error message.

    Raises:
        DataError: None of them can be read.
    """
    preprocess, split = backbone.preprocess, shared.index(data).to_look_at
    view = shared.view(data, [preprocess])
    # Nothing is held: a few hundred images are read once.
    source = ViewSource(split, view, memory_bytes=0.0, workers=data.workers)
    images_BCHW, _ = source.batch(keyed_random.permutation(seed, 0, len(split))[:images])
    if not len(images_BCHW):
        raise DataError(
            f"none of the first {images} training images can be read",
            given="; ".join(f"{name} ({reason})" for name, reason in source.bad_names()[:5]),
            do=f"repair them, or use an option that reads no images: {without_images}",
        )
    normalise = Preprocess(preprocess).to(accelerator().device)

    def batches() -> Iterator[Tensor]:
        for part_BCHW in images_BCHW.split(batch_size):
            # Moved as uint8, a quarter of the bytes of float32.
            yield normalise(part_BCHW.to(accelerator().device))

    return batches
