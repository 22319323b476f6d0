"""A GPU that computes shapes and devices, and no numbers: what meets a tensor on the CPU there is found without one.

PyTorch's fake tensors know which device they are on, and refuse an operation on two of them as CUDA does. Only the
backward pass cannot be taken: its engine looks for the driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

# The first backward pass starts a thread for each device that there is, and no process with such threads can be forked:
# here it is taken before there is a GPU.
torch.ones((), requires_grad=True).backward()
# One for all tests: what code remembers by device may be of an earlier one.
_GPU = FakeTensorMode()


@contextmanager
def computing_on_gpu() -> Iterator[None]:
    """Compute there; it ends early, without an error, where code looks at numbers or chooses rows by them.

    Raises:
        RuntimeError: A tensor on the CPU takes part.
    """
    with suppress(DataDependentOutputException, DynamicOutputShapeException), _GPU:
        yield


def on_gpu(like: Tensor) -> Tensor:
    """Return a tensor there of the same shape and type."""
    with _GPU:
        return torch.empty(like.shape, dtype=like.dtype, device="cuda")


def move(*modules: nn.Module) -> None:
    """Move parameters and buffers there, also what modules share."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, whose id no other tensor may take meanwhile
    for module in (one for root in modules for one in root.modules()):
        for table, make in ((module._parameters, _parameter), (module._buffers, on_gpu)):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = moved.setdefault(id(tensor), (tensor, make(tensor)))[1]


def _parameter(like: Tensor) -> nn.Parameter:
    return nn.Parameter(on_gpu(like), requires_grad=like.requires_grad)
