"""What the processes of a run do together. Each function here is called by all of them; alone, they cost nothing.

Gradients are averaged here rather than by torch's DistributedDataParallel, which does it inside the backward pass: a
process that ran out of memory there would leave the others waiting for ever.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from remap.data.views import ViewSource

Chunk = TypeVar("Chunk")
# Gradients travel together, in messages of at most this many bytes.
BUCKET_BYTES = 64 * 2**20


def all_reduce_max(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """The largest of each value over all processes."""
    if accelerator.num_processes == 1:
        return values
    together = torch.tensor(values, device=accelerator.device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return tuple(together.tolist())


def all_reduce_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values)
    return values


def all_reduce_max_(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The largest over all processes, in place."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def all_reduce_mean_(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """The mean over all processes, in place."""
    if accelerator.num_processes > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            _spread(flat.div_(accelerator.num_processes), bucket)


def broadcast_(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """The first process's values, in place."""
    if accelerator.num_processes > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            torch.distributed.broadcast(flat, src=0)
            _spread(flat, bucket)


def all_gather_object(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    values = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(values, value)
    return values


def chunks_of(count: int, size: int) -> list[np.ndarray]:
    """The numbers below ``count``, ``size`` at a time."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def rounds(accelerator: Accelerator, chunks: Sequence[Chunk]) -> Iterator[tuple[Sequence[Chunk], Chunk | None]]:
    """As many chunks at a time as there are processes, and the one of them that is this process's; None if it has none.

    All do the same number of rounds.
    """
    for first in range(0, len(chunks), accelerator.num_processes):
        taken = chunks[first : first + accelerator.num_processes]
        rank = accelerator.process_index
        yield taken, taken[rank] if rank < len(taken) else None


def share_unreadable(accelerator: Accelerator, source: ViewSource) -> None:
    """Each process has found the unreadable images of its own share; then all know of all."""
    for bad in all_gather_object(accelerator, dict(source.bad)):
        source.note_bad(bad)


def computed_together(
    accelerator: Accelerator,
    chunks: Sequence[Chunk],
    compute: Callable[[Chunk | None], tuple[np.ndarray, Mapping[str, Tensor]]],
    look: Callable[[], None],
) -> Iterator[tuple[Chunk, np.ndarray, dict[str, Tensor]]]:
    """Each process computes its share of the chunks, and all get every chunk's rows, in order.

    Args:
        compute: Gives which images of a chunk could be read (B,), and the rows of these, each (B, ...). For None, and
            where none could be read, it gives no rows, but of the same shapes and types: those of others go there.
        look: Called by all before each round.

    Yields:
        Each chunk, which of its images could be read (B,), and their rows, on the device.
    """
    for taken, mine in rounds(accelerator, chunks):
        look()
        good, rows = compute(mine)
        for source, (chunk, found) in enumerate(zip(taken, all_gather_object(accelerator, good), strict=False)):
            yield chunk, found, {name: _sent(accelerator, own, source, len(found)) for name, own in rows.items()}


def _sent(accelerator: Accelerator, own: Tensor, source: int, count: int) -> Tensor:
    """The first ``count`` rows of one process, on all; ``own`` has the shape of a row and its type everywhere."""
    mine = source == accelerator.process_index
    rows = own[:count].contiguous() if mine else own.new_empty(count, *own.shape[1:])
    if accelerator.num_processes > 1 and rows.numel():
        torch.distributed.broadcast(rows.view(-1).view(torch.uint8), src=source)  # as bytes: of any type
    return rows


def all_reduce_min_max(value: int, device: torch.device) -> tuple[int, int]:
    """Over all processes of torch's group; unlike the others here it needs no Accelerator."""
    if not _is_group():
        return value, value
    ends = torch.tensor([value, -value], device=device)
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MIN)
    low, high = ends.tolist()
    return low, -high


def is_main_process() -> bool:
    """Whether this is the first process of torch's group, or the only one."""
    return not _is_group() or torch.distributed.get_rank() == 0


def _is_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Tensors of one dtype, in their order, cut where a message is full."""
    for _, alike in groupby(sorted(tensors, key=lambda t: str(t.dtype)), key=lambda tensor: tensor.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


@torch.no_grad()
def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
