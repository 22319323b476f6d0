"""Training images for whatever looks at some before there is a student."""

from collections.abc import Callable, Iterator

from torch import Tensor

from remap.backbones.build import Backbone
from remap.backbones.preprocess import Preprocess
from remap.data import keyed_random
from remap.data.views import View, ViewSource
from remap.distributed.launch import accelerator
from remap.errors import DataError
from remap.pipeline.shared import SharedResources
from remap.recipe.schema import DataSpec


def training_pixels(
    backbone: Backbone, data: DataSpec, seed: int, bench: SharedResources, *, images: int, batch_size: int, instead: str
) -> Callable[[], Iterator[Tensor]]:
    """Batches (B, 3, S, S) of labelled training images as a backbone takes them; those of a seed are always the same.

    Args:
        images: How many at the most.
        instead: What would need no images.

    Raises:
        DataError: None of them can be read.
    """
    preprocess, split = backbone.preprocess, bench.index(data).train
    view = View(preprocess.size, preprocess.crop_pct, preprocess.interpolation)
    source = ViewSource(split, view, memory_bytes=0.0, workers=data.workers)
    images_BCHW, _ = source.batch(keyed_random.permutation(seed, 0, len(split))[:images])
    if not len(images_BCHW):
        raise DataError(
            "none of the training images to be looked at can be read",
            given="; ".join(f"{name} ({reason})" for name, reason in source.bad_names()[:5]),
            do=f"repair them, or do without images: {instead}",
        )
    normalise = Preprocess(preprocess).to(accelerator().device)

    def batches() -> Iterator[Tensor]:
        for part_BCHW in images_BCHW.split(batch_size):
            yield normalise(part_BCHW.to(accelerator().device))

    return batches
