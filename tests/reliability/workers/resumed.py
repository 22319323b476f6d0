"""One of two processes of tests/reliability/test_exact_resume.py: stopped twice, resumed twice; notes what it used."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from remap.distributed.launch import accelerator
from remap.engine.teacher import Teacher
from remap.errors import Interrupted
from remap.pipeline.run import resume, start
from remap.recipe import resolve

words, settings, stops, folder = json.loads(sys.argv[1])
rank = accelerator().process_index
torch.set_num_threads(1)

targets = Teacher.targets
used: list[list[int]] = []


def noting(teacher: Teacher, images_BCHW: torch.Tensor, indices_B: Any, view: int) -> Any:
    used.append(indices_B.tolist())
    if rank == 1 and len(used) in stops:  # a signal to one of the two, in the middle of its step
        signal.raise_signal(signal.SIGTERM)
    return targets(teacher, images_BCHW, indices_B, view)


Teacher.targets = noting
run, went_on = Path(folder) / "run", 0
try:
    start(resolve(words=words, settings=settings), run)
except Interrupted:
    for _ in stops[1:]:
        try:
            resume(run)
        except Interrupted:
            went_on += 1
    resume(run)
    went_on += 1
(Path(folder) / f"rank{rank}.json").write_text(json.dumps({"used": used, "went_on": went_on}))
