"""Threads that read and decode."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from remap.errors import starting_threads

# Batches that are decoded while one is computed.
AHEAD = 2
Item = TypeVar("Item")
Result = TypeVar("Result")


def _renew_pool() -> None:
    """Make PyTorch's own pool of threads, which a forked process has lost, in the one thread that it has.

    PyTorch makes it when a thread first computes; of two that do so at once, one finds none ("Invalid thread pool!").
    """
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(torch.get_num_threads())


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_renew_pool)


class _Pool(ThreadPoolExecutor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with starting_threads():  # each of them starts with the work that needs it
            return super().submit(fn, *args, **kwargs)


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool. A block that is left early does not wait for it: a signal must not wait for slow reads.

    Raises:
        ThreadRefused: In the block, where the system starts no more threads.
    """
    pool = _Pool(count)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the function's result, in order; at most ``ahead`` items wait, so that memory is flat."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= ahead:
            item, result = waiting.popleft()
            yield item, result.result()
    while waiting:
        item, result = waiting.popleft()
        yield item, result.result()


def made_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD
) -> Iterator[tuple[Item, Result]]:
    """Yield as ``map_ahead``: while one result is worked on, the next ``ahead`` are made, each in a thread of its own.

    ``items`` is read in the caller's thread, and may look at what the caller did with earlier results. The threads end
    with the loop: one that outlived it would be missing in a forked process, and starting them takes 0.1 ms.
    """
    with threads(ahead) as pool:
        yield from map_ahead(pool, function, items, ahead + 1)
