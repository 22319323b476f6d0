"""Peak memory of this process, and the errors that mean memory ran out."""

import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

# Messages of libraries when memory runs out, besides those that Accelerate knows.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to the device without waiting: for a GPU by way of pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def peak_bytes(device: torch.device) -> int:
    """Return the peak bytes allocated on a GPU, or the peak resident size of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Let the peak start anew from what is held now, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error means that the memory of a GPU or of the machine ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
