"""One of several processes of tests/reliability/test_many_processes.py; writes down what it did."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from remap.distributed.launch import accelerator
from remap.engine import loop
from remap.engine.evaluation_pass import evaluate
from remap.engine.teacher import Teacher
from remap.errors import Interrupted
from remap.pipeline.components import build_components
from remap.pipeline.run import resume, start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import resolve

count, folder, words, settings, sizes, stop = json.loads(sys.argv[1])
folder = Path(folder)
rank = accelerator().process_index
torch.set_num_threads(1)
# What torch's collectives of objects go through: it is None, so that they fail.
torch.distributed.distributed_c10d._object_to_tensor = torch.distributed.distributed_c10d._tensor_to_object = None
noted: dict[str, Any] = {"processes": accelerator().num_processes, "averaged": [], "used": {}}

# The first images of the digits' evaluation split, in batches that do not divide.
parts = build_components(resolve(words={**words, "data": "digits", "losses": "ce"}), None, Silent(), SharedResources())
source, evaluated = parts.views.val, []
whole = source.split
for size in sizes:
    source.split = whole.take(range(size))
    found = evaluate(parts.student, source, accelerator(), batch_size=8, bf16=False, progress=Silent(), what="digits")
    evaluated.append([found.correct, found.count, found.accuracy, found.predictions_N.tolist()])
noted["evaluated"] = evaluated

targets, average = Teacher.targets, loop.all_reduce_mean_
used: list[list[int]] = []


def noting(teacher: Teacher, images_BCHW: torch.Tensor, indices_B: Any, view: int) -> Any:
    used.append(indices_B.tolist())
    if len(used) == stop_at and rank == 1:
        signal.raise_signal(signal.SIGTERM)
    return targets(teacher, images_BCHW, indices_B, view)


def counting(accelerator: Any, tensors: list[torch.Tensor]) -> None:
    noted["averaged"].append(sum(tensor.numel() for tensor in tensors))
    average(accelerator, tensors)


Teacher.targets, loop.all_reduce_mean_ = noting, counting
if stop:
    stop_at = 0
    resume(folder / "grown")  # begun by one process
    noted["used"]["grown"], used, stop_at = used, [], stop
    try:
        start(resolve(words=words, settings=settings), folder / "shrunk")
    except Interrupted:
        noted["used"]["shrunk"] = used  # one process goes on
(folder / f"noted-{count}-{rank}.json").write_text(json.dumps(noted))
