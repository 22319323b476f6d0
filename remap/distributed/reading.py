"""What processes read together: each a part of it, and the rest comes from the others. Every process has to call it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from remap.data.fingerprint import Contents, ranges
from remap.data.shards import DEALT, Shard
from remap.data.views import ViewSource
from remap.distributed import collectives
from remap.distributed.collectives import all_gather_json, all_gather_rows, broadcast_rows, share_unreadable
from remap.distributed.launch import ProcessLost
from remap.errors import DataError, RemapError
from remap.progress import Progress


def load_together(accelerator: Accelerator, source: ViewSource, progress: Progress, what: str) -> None:
    """Decode everything once, where it fits in memory, and hold all of it; afterwards ``source.bad`` is complete."""
    parts = source.load(progress, what, accelerator.process_index, accelerator.num_processes)
    if accelerator.num_processes == 1 or not parts:
        return
    for rank, part in enumerate(parts):
        for rows in part.split(max(1, collectives.BUCKET_BYTES // source.view.nbytes)):
            rows.copy_(broadcast_rows(accelerator, rows.to(accelerator.device), rank, len(rows)))
    share_digests(accelerator, source.contents)
    share_unreadable(accelerator, source)


def read_digests(accelerator: Accelerator, contents: Contents, progress: Progress, what: str) -> None:
    """Read the files whose digests are not known yet, each process its part; afterwards all know all of them."""
    if accelerator.num_processes > 1:
        parts = ranges(len(contents.split), accelerator.num_processes)
        contents.complete(progress, what, parts[accelerator.process_index])
        share_digests(accelerator, contents)


def share_digests(accelerator: Accelerator, contents: Contents) -> None:
    """Tell all processes which digests each of them knows."""
    if accelerator.num_processes > 1:
        indices, digests = (all_gather_rows(accelerator, rows) for rows in contents.known())
        for known in zip(indices, digests, strict=True):
            contents.learn(*known)


@contextmanager
def listing_together(accelerator: Accelerator) -> Iterator[None]:
    """Within the block all processes open the same sources, and each lists its part of the shards."""

    def dealt(shards: Sequence[Shard], work: Callable[[Shard], Any]) -> list[Any]:
        rank, count = accelerator.process_index, accelerator.num_processes
        mine, error = list[Any](), None
        try:
            mine = [work(shard) for shard in shards[rank::count]]
        except RemapError as problem:
            error = problem  # raised after the others know that there is nothing to wait for
        names = hashlib.sha256("\0".join(shard.name for shard in shards).encode(errors="surrogatepass")).hexdigest()
        every = all_gather_json(accelerator, [names, None if error else mine])
        if error is not None:
            raise error
        if any(part is None for _, part in every):
            raise ProcessLost("another process cannot list its part of the shards")
        if any(one != names for one, _ in every):
            raise DataError("processes see different shards", do="let all machines see the same files under one path")
        return [every[number % count][1][number // count] for number in range(len(shards))]

    token = DEALT.set(dealt if accelerator.num_processes > 1 else None)
    try:
        yield
    finally:
        DEALT.reset(token)
