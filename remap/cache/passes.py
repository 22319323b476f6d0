"""Passes of a frozen network, all of one size."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from remap.distributed.device_memory import is_out_of_memory
from remap.distributed.sharding import is_sharded
from remap.network import Network


class OutputModel(Protocol):
    """A frozen teacher whose outputs are cached (``remap.engine.teacher.Teacher``).

    Attributes:
        at_once: The most images whose outputs there was memory for, once it ran out; 0 before.
    """

    network: Network
    at_once: int

    def items(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the outputs for raw pixels (B, 3, V, V)."""


def run_in_passes(
    run: Callable[[Tensor], Mapping[str, Tensor]], images_BCHW: Tensor, size: int, passes: int = 1
) -> dict[str, Tensor]:
    """Return what ``run`` computes of images, in passes of exactly ``size``; the last one is filled up with images.

    The last bits of a matrix product may depend on its shape: what is computed before training is computed in batches
    of the shape of a training step, and has the bits that it would have there.

    Args:
        run: Computes rows (size, ...) of images.
        images_BCHW: Raw pixels; or anything else that has a row for each image.
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
        images_BCHW = torch.cat([images_BCHW] * -(-filled // count))[:filled]
    rows = [run(part) for part in images_BCHW.split(size)]
    if len(rows) == 1:  # most often, and then nothing needs a copy
        return {name: value[:count] for name, value in rows[0].items()}
    return {name: torch.cat([each[name] for each in rows])[:count] for name in rows[0]}


def outputs_of(teacher: OutputModel, images_BCHW: Tensor, batch_size: int, at_once: int) -> dict[str, Tensor]:
    """Return the outputs of up to ``batch_size`` images, in passes of ``at_once``.

    Where memory does not suffice for that many, passes become smaller. A sharded teacher makes as many for no image as
    for all, since other processes take part in each.
    """
    while True:
        size = min(teacher.at_once or at_once, at_once)
        passes = -(-batch_size // size) if is_sharded(teacher.network) else 1
        try:
            return run_in_passes(teacher.items, images_BCHW, size, passes)
        except (RuntimeError, MemoryError) as error:
            # Processes with a sharded teacher would have to agree on a smaller size, so there the error stays.
            if not is_out_of_memory(error) or size == 1 or is_sharded(teacher.network):
                raise
        # Outside of the handler: while the error is handled, it keeps the tensors of the failed pass alive.
        teacher.at_once = size // 2
        clear_device_cache(garbage_collection=True)
