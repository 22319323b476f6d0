"""What the processes of a run do together. Each function here is called by all of them; alone, they cost nothing.

Gradients are averaged here rather than by torch's DistributedDataParallel, which does it inside the backward pass: a
process that ran out of memory there would leave the others waiting for ever.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from accelerate import Accelerator
from torch import Tensor

# Gradients travel together, in messages of at most this many bytes.
BUCKET_BYTES = 64 * 2**20


def agreed(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """The largest of each value over all processes."""
    if accelerator.num_processes == 1:
        return values
    together = torch.tensor(values, device=accelerator.device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return tuple(together.tolist())


def total(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values)
    return values


def largest(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The largest over all processes, in place."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def average(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """The mean over all processes, in place."""
    if accelerator.num_processes > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            _spread(flat.div_(accelerator.num_processes), bucket)


def from_first(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """The first process's values, in place."""
    if accelerator.num_processes > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            torch.distributed.broadcast(flat, src=0)
            _spread(flat, bucket)


def lowest_and_highest(value: int, device: torch.device) -> tuple[int, int]:
    """Over all processes of torch's group; unlike the others here it needs no Accelerator."""
    if not _is_group():
        return value, value
    ends = torch.tensor([value, -value], device=device)
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MIN)
    low, high = ends.tolist()
    return low, -high


def is_first() -> bool:
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
