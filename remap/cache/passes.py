"""Passes of a frozen network, all of one size."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def run_in_passes(
    run: Callable[[Tensor], Mapping[str, Tensor]], images_BCHW: Tensor, size: int, passes: int = 1
) -> dict[str, Tensor]:
    """Return what ``run`` computes of images, in passes of exactly ``size``; the last one is filled up with images.

    The last bits of a matrix product may depend on its shape: what is computed before training is computed in batches
    of the shape of a training step, and has the bits that it would have there.

    Args:
        run: Computes rows (size, ...) of images.
        images_BCHW: Raw pixels.
        size: Images of a pass.
        passes: The least number of passes; of black images, where there is no image.

    Returns:
        Rows of the images, each (B, ...).
    """
    count = len(images_BCHW)
    filled = max(passes, -(-count // size)) * size
    if not count:
        images_BCHW = images_BCHW.new_zeros(filled, *images_BCHW.shape[1:])
    elif count < filled:
        images_BCHW = images_BCHW.repeat(-(-filled // count), 1, 1, 1)[:filled]
    rows = [run(part) for part in images_BCHW.split(size)]
    if len(rows) == 1:  # most often, and then nothing needs a copy
        return {name: value[:count] for name, value in rows[0].items()}
    return {name: torch.cat([each[name] for each in rows])[:count] for name in rows[0]}
