"""One of two processes of tests/reliability/test_faults.py; what goes wrong does so on the second alone."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from remap.distributed.launch import accelerator
from remap.engine import loop, step, training
from remap.engine.job import StudentStep
from remap.pipeline.run import resume, start
from remap.recipe import Recipe, resolve
from remap.remapping.objective import Objective
from remap.runs.run_dir import RunDir

data, student, teacher, resnet, folder = sys.argv[1:]
SETTINGS = ("data.workers=1", "train.epochs=2", "train.batch_size=8", "train.warmup_epochs=0.5", "train.lr=0.01")
second, root = accelerator().process_index == 1, Path(folder)
torch.set_num_threads(1)


def recipe(*settings: str, **words: str) -> Recipe:
    words = {"data": data, "student": student, "teacher": teacher, **words}
    return resolve(words=words, settings=[*SETTINGS, "data.augment=shift", *settings])


often = recipe("train.checkpoint_seconds=0")

# Memory runs out.
forward = StudentStep.forward


def limited(module: StudentStep, images_BCHW: torch.Tensor, *rest: Any) -> Any:
    if second and len(images_BCHW) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return forward(module, images_BCHW, *rest)


StudentStep.forward = limited
start(often, root / "memory")
StudentStep.forward = forward

# A number is not finite in the third step.
objective_forward, forward_backward, calls = Objective.forward, loop.forward_backward, [0]


def counted(running: training.Training, update: int) -> step.Sums:
    calls[0] += 1
    if calls[0] == fails_at:
        raise RuntimeError("power cut")
    return forward_backward(running, update)


def poisoned(objective: Objective, *arguments: Any) -> Any:
    total, parts = objective_forward(objective, *arguments)
    return (total * float("nan") if second and calls[0] == 3 else total), parts


fails_at = 0
loop.forward_backward, Objective.forward = counted, poisoned
start(often, root / "nan")
Objective.forward = objective_forward

# A run that one process began in eight micro-batches to a step.
resume(root / "halved")

# No image of one micro-batch can be read.
make = step.batches


def emptied(source: Any, plan: Any, epoch: int, first_step: int = 0) -> Iterator[Any]:
    for number, batch in enumerate(make(source, plan, epoch, first_step)):
        if second and epoch == 0 and number == 1:
            rows = {"images_BCHW": batch.images_BCHW[:0], "labels_B": batch.labels_B[:0]}
            batch = replace(batch, **rows, indices_B=batch.indices_B[:0], keys_B=batch.keys_B[:0])
        yield batch


step.batches = emptied
start(often, root / "unreadable")
step.batches = make

# The first process is slow to write, so that a checkpoint is due at other times on each.
write_metrics, save = RunDir.write_metrics, training.save_checkpoint


def slowly(run: RunDir, history: list[dict[str, Any]]) -> None:
    time.sleep(0.15)
    write_metrics(run, history)


def slow_save(*arguments: Any) -> None:
    time.sleep(0.05)
    save(*arguments)


RunDir.write_metrics, training.save_checkpoint = slowly, slow_save
start(recipe("train.checkpoint_seconds=0.1"), root / "clocks")
RunDir.write_metrics, training.save_checkpoint = write_metrics, save

# Batch statistics of the student and of its average, across a break.
averaging = recipe(
    *("train.checkpoint_seconds=0", "teacher.decay=0.5", "teacher.allow_weak=true"),
    **{"student": resnet, "method": "full", "teacher": "ema", "losses": "ce,kd"},
)
start(averaging, root / "average-whole")
calls[0], fails_at = 0, 4
try:
    start(averaging, root / "average")
except RuntimeError as error:
    assert "power cut" in str(error)
fails_at = 0
resume(root / "average")
