"""Steps that the host need not wait for: the device leaves out one that is not finite, the host reads that later.

So a GPU always has work. What is not finite is never used, as elsewhere; a halved learning rate begins a step later.
"""

import torch

from remap.engine.step import Pending
from remap.engine.teacher import Teacher
from remap.engine.training import Training

# Kinds of devices that work while the host does something else.
DEVICES = ("cuda",)


def may_read_late(training: Training) -> bool:
    """Return whether the optimiser is all that an update changes, and this process all that has to know of it."""
    job, optimizer = training.job, training.optimizer
    return (
        training.accelerator.device.type in DEVICES
        and training.accelerator.num_processes == 1  # several wait for each other in each step
        and isinstance(optimizer, torch.optim.AdamW)
        and bool(optimizer.defaults["fused"])  # no other kind takes ``found_inf``
        and not training.buffers  # which ``skip_step`` restores, and a later step has changed by then
        and training.average is None
        and not job.student.attached.pruning
        and all(type(teacher).after_step is Teacher.after_step for teacher in job.teachers)
        and not job.objective.follows_updates
    )


def step_if_finite(training: Training, pending: Pending) -> None:
    """Update the parameters, or leave them and their moments as they are; the device decides (as for a GradScaler)."""
    optimizer = training.optimizer
    optimizer.found_inf = pending.not_finite  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        # Left there, it would be in copies of the optimiser too, which step on the CPU (``state_after_a_step``).
        del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)


def rate_factor(training: Training, update: int) -> float:
    """Return what the learning rate of an update is multiplied by.

    Where the host reads late, the step right after a fault was begun before the fault was known. It has the earlier
    rate also where a checkpoint made the host read at once, or a resumed run would not have the same bits.
    """
    state = training.state
    unknown = training.reads_late and 0 < state.outrun_fault == update
    return state.lr_factor * (2.0 if unknown else 1.0)
