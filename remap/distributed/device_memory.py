"""Free memory of this machine, peak memory of this process, and the errors that mean memory ran out."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

# Where the kernel shows its counts; the files of a control group of version 2 and of version 1 (limit, use, and the key
# of ``memory.stat`` for cached files that the kernel gives up when memory is wanted).
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
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


def free_bytes() -> int:
    """Return how many bytes this process may still take: of the machine, and of the control groups that it is in."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # elsewhere than on Linux, all of it
    with suppress(OSError):
        kib = {name: int(value.split()[0]) for name, value in _pairs(PROC / "meminfo", ":")}
        older = kib["MemFree"] + kib.get("Buffers", 0) + kib.get("Cached", 0)  # before Linux 3.14
        free = 1024 * kib.get("MemAvailable", older)
    return max(0, min([free, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield what the limit of each control group around this process leaves, as a container or SLURM sets it."""
    with suppress(OSError):
        for _, line in _pairs(PROC / "self/cgroup", ":"):
            controllers, _, path = line.partition(":")
            if controllers and "memory" not in controllers.split(","):
                continue
            root, (limit, used, cached) = (CGROUPS / "memory", _V1) if controllers else (CGROUPS, _V2)
            group = PurePosixPath(path.lstrip("/"))
            for folder in (root / one for one in (group, *group.parents)):
                with suppress(OSError, ValueError):  # a folder outside of the container, or "max"
                    files = int(dict(_pairs(folder / "memory.stat", " ")).get(cached, 0))
                    yield int((folder / limit).read_text()) - int((folder / used).read_text()) + files


def _pairs(path: Path, sign: str) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(sign)
        yield name, value


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
