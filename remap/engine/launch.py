"""One process or many: the only place that starts Accelerate."""

import atexit
import functools
import os

import torch
from accelerate import Accelerator

from remap.errors import TrainingError


@functools.cache
def accelerator() -> Accelerator:
    """The process group of this run; device and ranks come from the launcher's environment."""
    # The recipe alone decides the precision, whatever a saved configuration of the launcher says.
    # Told nothing, Accelerate leaves the processes of a launcher on a machine without a GPU each to itself.
    atexit.register(_leave_group)
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")


def _leave_group() -> None:
    """Close the process group in order: torn down by the interpreter's exit, a rank may abort after all went well."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_processes(wanted: int | None) -> None:
    """Compare the number of processes with what was asked for.

    Raises:
        TrainingError: They differ; some launchers start fewer processes than asked for without a word.
    """
    running = accelerator().num_processes
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != running:
        raise TrainingError(f"the launcher started {launched} processes, but {running} found each other")
    if wanted is not None and wanted != running:
        raise TrainingError(
            f"this run asks for {wanted} processes and has {running}",
            given=f"WORLD_SIZE={os.environ.get('WORLD_SIZE', 'not set')}",
            do=f"torchrun --nproc-per-node {wanted} -m remap_cli ...",
        )


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: asked for, or "auto" on a GPU that has it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"
