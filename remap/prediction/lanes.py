"""Students that compute side by side on a CPU: copies on the same weights, each with a share of the cores.

Threads of one forward pass wait for each other after each operation. Small networks on small batches lose a quarter of
the time by that; passes side by side do not wait (benchmarks/predicting.py lanes).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import torch

from remap.data.thread_pool import map_ahead, threads
from remap.pipeline.student_api import Student

# Images of a forward pass at least: with fewer, what an operation costs by itself counts.
LEAST_IMAGES = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


def most_lanes(students: Mapping[str, Student], batch_size: int) -> int:
    """Return how many copies may share a batch."""
    on_cpu = all(student.device.type == "cpu" for student in students.values())
    return max(1, min(torch.get_num_threads(), batch_size // LEAST_IMAGES)) if on_cpu else 1


@contextmanager
def lanes(students: Mapping[str, Student], count: int) -> Iterator[list[Mapping[str, Student]]]:
    """Yield the students and copies of them, as many as ``count`` says, and divide the threads among them meanwhile.

    A copy has modules and hooks of its own, so what a forward pass leaves in them is not seen by another one; its
    tensors are those of the original. Students that share a backbone do so in each copy.
    """
    if count <= 1:
        yield [students]
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // count))  # also of threads that start later
    try:
        yield [students, *(_copy(students) for _ in range(count - 1))]
    finally:
        torch.set_num_threads(before)


def side_by_side(
    functions: Sequence[Callable[[Item], Iterable[Result]]], items: Iterable[Item]
) -> Iterator[list[Result]]:
    """Yield what one of the functions makes of each item, in order; each is called by one thread at a time."""
    if len(functions) == 1:  # in this thread
        yield from (list(functions[0](item)) for item in items)
        return
    free = SimpleQueue[Callable[[Item], Iterable[Result]]]()
    for function in functions:
        free.put(function)

    def by_one(item: Item) -> list[Result]:
        function = free.get_nowait()  # there are as many as threads
        try:
            return list(function(item))
        finally:
            free.put(function)

    with threads(len(functions)) as pool:
        # One item more than can be computed waits, so that no function does while results are written.
        yield from (result for _, result in map_ahead(pool, by_one, items, len(functions) + 1))


def _copy(students: Mapping[str, Student]) -> dict[str, Student]:
    models = [student.network.model for student in students.values()]
    shared = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(dict(students), shared)
