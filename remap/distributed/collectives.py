"""Collective operations: every process of the run has to call them at the same point. With one process they are free.

Gradients are averaged here rather than by torch's DistributedDataParallel, which does it inside the backward pass: a
process that ran out of memory there would leave the others waiting for ever.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from remap.data.thread_pool import made_ahead
from remap.data.views import ViewSource

Chunk = TypeVar("Chunk")
# Gradients are sent together, in messages of at most this many bytes: few messages, and no second copy of all of them.
BUCKET_BYTES = 64 * 2**20


def all_reduce_max(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """Return the largest of each value over all processes."""
    if accelerator.num_processes == 1:
        return values
    return tuple(all_reduce_max_(accelerator, torch.tensor(values, device=accelerator.device)).tolist())


def all_reduce_counts(accelerator: Accelerator, *counts: int) -> tuple[int, ...]:
    """Return the sum of each count over all processes."""
    if accelerator.num_processes == 1:
        return counts
    return tuple(all_reduce_sum(accelerator, torch.tensor(counts, device=accelerator.device)).tolist())


def all_reduce_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Replace values by their sum over all processes, in place."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values)
    return values


def all_reduce_max_(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Replace values by the largest over all processes, in place."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def all_reduce_mean_(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their mean over all processes, in place."""
    if accelerator.num_processes > 1:
        for bucket in _buckets(tensors):
            # One message for many small tensors: latency, not bandwidth, is what they cost.
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            _copy_back(flat.div_(accelerator.num_processes), bucket)


def broadcast_(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the first process, in place."""
    if accelerator.num_processes > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            torch.distributed.broadcast(flat, src=0)
            _copy_back(flat, bucket)


def all_gather_rows(accelerator: Accelerator, rows: np.ndarray) -> list[np.ndarray]:
    """Return the rows (n, ...) of all processes, in their order; their number n may differ, dtype and width do not."""
    if accelerator.num_processes == 1:
        return [rows]
    counts = [int(count) for count in _gather(accelerator, torch.tensor([len(rows)]))]
    # Messages of one collective call have one size: all are padded to the longest, and sent as bytes of any dtype.
    padded = np.zeros((max(counts), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    messages = _gather(accelerator, torch.from_numpy(padded.reshape(-1).view(np.uint8))) if padded.size else []
    arrays = [message.numpy().view(rows.dtype).reshape(padded.shape) for message in messages]
    return [array[:count] for array, count in zip(arrays, counts, strict=True)] if arrays else [rows for _ in counts]


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all processes in one tensor, in their order; their number n may differ."""
    if accelerator.num_processes == 1:
        return rows
    counts = [len(count) for count in all_gather_rows(accelerator, np.zeros(len(rows), np.uint8))]
    return torch.cat([broadcast_rows(accelerator, rows, rank, count) for rank, count in enumerate(counts)])


def all_gather_json(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the values of all processes, in their order, as JSON gives them back (tuples become lists).

    Not ``torch.distributed.all_gather_object``, which unpickles what comes over the network.
    """
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return [json.loads(bytes(array)) for array in all_gather_rows(accelerator, text)]


def _gather(accelerator: Accelerator, tensor: Tensor) -> list[Tensor]:
    own = tensor.to(accelerator.device)
    gathered = [torch.empty_like(own) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(gathered, own)
    return [one.cpu() for one in gathered]


def index_chunks(count: int, size: int) -> list[np.ndarray]:
    """Cut the numbers from 0 to ``count`` - 1 into arrays of ``size``; the last may be shorter."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def rounds_of_chunks(
    accelerator: Accelerator, chunks: Sequence[Chunk]
) -> Iterator[tuple[Sequence[Chunk], Chunk | None]]:
    """Yield the chunks of each round, one for each process, and the one of this process; None if it has none.

    All do the same number of rounds, so a collective call in each of them is safe.
    """
    for first in range(0, len(chunks), accelerator.num_processes):
        taken = chunks[first : first + accelerator.num_processes]
        rank = accelerator.process_index
        yield taken, taken[rank] if rank < len(taken) else None


def share_unreadable(accelerator: Accelerator, source: ViewSource) -> None:
    """Tell all processes which images each has found unreadable in its share."""
    for bad in all_gather_json(accelerator, list(source.bad.items())):
        source.note_bad(dict(bad))


def compute_and_gather(
    accelerator: Accelerator,
    chunks: Sequence[Chunk],
    load: Callable[[Chunk | None], tuple[Tensor, np.ndarray]],
    compute: Callable[[Tensor], Mapping[str, Tensor]],
    before_round: Callable[[], None],
) -> Iterator[tuple[Chunk, np.ndarray, dict[str, Tensor]]]:
    """Compute a share of the chunks on each process, and yield every chunk's rows on all of them, in order.

    Args:
        load: Returns the images of a chunk, none for None, and which of them could be read (B,). It runs in threads,
            ahead of ``compute``.
        compute: Returns the rows of images, each (B, ...). Of no image it returns no rows, but of the same shapes and
            types: those of others go there.
        before_round: Called by all before each round.

    Yields:
        Each chunk, which of its images could be read (B,), and their rows, on the device.
    """
    rounds = rounds_of_chunks(accelerator, chunks)
    for (taken, _), (images, readable) in made_ahead(lambda one: load(one[1]), rounds):
        before_round()
        rows = compute(images)
        gathered = all_gather_rows(accelerator, readable)
        for rank, (chunk, indices) in enumerate(zip(taken, gathered, strict=False)):  # the last round may be short
            yield chunk, indices, {k: broadcast_rows(accelerator, own, rank, len(indices)) for k, own in rows.items()}


def broadcast_rows(accelerator: Accelerator, own: Tensor, rank: int, count: int) -> Tensor:
    """Return the ``count`` rows of one process on all; ``own`` has the shape of a row and its type everywhere."""
    mine = rank == accelerator.process_index
    rows = own[:count].contiguous() if mine else own.new_empty(count, *own.shape[1:])
    if accelerator.num_processes > 1 and rows.numel():
        torch.distributed.broadcast(rows.view(-1).view(torch.uint8), src=rank)  # as bytes: of any type
    return rows


def all_reduce_min_max(value: int, device: torch.device) -> tuple[int, int]:
    """Return the smallest and the largest value over torch's group; unlike the others here without an Accelerator."""
    if not _is_group():
        return value, value
    ends = torch.tensor([value, -value], device=device)  # one message: the largest is minus the smallest negative
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MIN)
    low, high = ends.tolist()
    return low, -high


def is_main_process() -> bool:
    """Whether this is the first process of torch's group, or the only one."""
    return not _is_group() or torch.distributed.get_rank() == 0


def _is_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Yield tensors of one dtype, in their order, cut where a message is full."""
    for _, alike in groupby(sorted(tensors, key=lambda t: str(t.dtype)), key=lambda tensor: tensor.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


@torch.no_grad()
def _copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
