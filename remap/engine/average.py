"""Running averages of what a student trains: one that teaches it, and one that is the result."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from remap.network import Network


class Average:
    """A running average of tensors that training changes (Tarvainen and Valpola 2017, arXiv 1703.01780).

    Args:
        pairs: Each tensor of the average with the one it follows.
        decay: Share of the average that stays in each step, once there were enough steps.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], decay: float) -> None:
        self.pairs, self.decay = pairs, decay

    def follow(self, update: int) -> None:
        """Move towards the followed tensors, after update number ``update`` (from 0 over the whole run)."""
        # The first weights count less and less: with a decay of 0.999 they would stay for thousands of steps.
        move_average(self.pairs, min(self.decay, (1 + update) / (10 + update)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the numbers of the average and of what it follows, and exchange them again, to the same bits."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # In place: the optimiser and the module of the step hold these very tensors.
        for average, current in self.pairs:
            # By copies and not by arithmetic, which would round.
            before = current.clone()
            current.copy_(average)
            average.copy_(before)


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy without a gradient; of a parameter, a parameter."""
    copied = tensor.detach().clone()
    # ``Training.start_epoch`` tells buffers, which are broadcast in each step, from parameters by this type.
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def average_pairs(average: Network, student: Network) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor of the average that is not shared, with the student's of the same name."""
    tensors = average.tensors
    return [(tensors[name], tensor) for name, tensor in student.tensors.items()]


@torch.no_grad()
def move_average(pairs: Sequence[tuple[Tensor, Tensor]], decay: float) -> None:
    """Set the first of each pair to decay * first + (1 - decay) * second, in place; counters are copied."""
    for average, current in pairs:
        if average.is_floating_point():
            average.lerp_(current, 1.0 - decay)
        else:
            average.copy_(current)  # a count of batches is an integer, which lerp_ does not take
