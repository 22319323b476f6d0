"""One of two processes of tests/reliability/test_faults.py; only the second has something go wrong."""

import sys
from pathlib import Path
from typing import Any

import torch

from remap.engine import fit as loop
from remap.engine.job import StudentStep
from remap.engine.launch import accelerator
from remap.recipe import resolve
from remap.remapping.objective import Objective
from remap.running import start

data, student, teacher, folder = sys.argv[1:]
SETTINGS = (
    *("data.workers=1", "train.epochs=2", "train.batch_size=8", "train.warmup_epochs=0.5", "train.lr=0.01"),
    *("train.checkpoint_seconds=0", "data.augment=shift"),
)
recipe = resolve(words={"data": data, "student": student, "teacher": teacher}, settings=SETTINGS)
second = accelerator().process_index == 1
torch.set_num_threads(1)

forward = StudentStep.forward


def limited(step: StudentStep, images_BCHW: torch.Tensor, *rest: Any) -> Any:
    if second and len(images_BCHW) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return forward(step, images_BCHW, *rest)


StudentStep.forward = limited
start(recipe, Path(folder) / "memory")
StudentStep.forward = forward

objective_forward, loop_step, calls = Objective.forward, loop.Loop.step, [0]


def counted(running: loop.Loop, steps: int) -> float | None:
    calls[0] += 1
    return loop_step(running, steps)


def poisoned(objective: Objective, *arguments: Any) -> Any:
    total, parts = objective_forward(objective, *arguments)
    return (total * float("nan") if second and calls[0] == 3 else total), parts


loop.Loop.step, Objective.forward = counted, poisoned
start(recipe, Path(folder) / "nan")
