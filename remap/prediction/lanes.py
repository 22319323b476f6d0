"""Students that compute side by side on a CPU: copies on the same weights, each with a share of the cores.

Threads of one forward pass wait for each other after each operation. Small networks on small batches lose a quarter of
the time by that; passes side by side do not wait (benchmarks/predicting.py lanes).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from remap.pipeline.student_api import Student

# Images of a forward pass at least: with fewer, what an operation costs by itself counts.
LEAST_IMAGES = 16


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


def _copy(students: Mapping[str, Student]) -> dict[str, Student]:
    models = [student.network.model for student in students.values()]
    shared = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(dict(students), shared)
