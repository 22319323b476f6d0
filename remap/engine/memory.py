"""Peak memory of this process."""

import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU, or the peak resident size of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
