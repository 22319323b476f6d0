"""Two processes that share out weights, for tests/reliability/test_sharding.py; each writes down what it did."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from forked import be_one_of, free_port
from torch.distributed.tensor import DTensor

from remap.distributed.sharding import bytes_held
from remap.engine import loop
from remap.engine.job import Job
from remap.engine.training import Training
from remap.errors import Interrupted
from remap.pipeline import epoch_recorder, run
from remap.recipe import resolve
from remap.tuning import METHODS

folder = Path(sys.argv[1])
plan = json.loads((folder / "plan.json").read_text())
torch.set_num_threads(1)
# What torch's collectives of objects go through: it is None, so that they fail.
torch.distributed.distributed_c10d._object_to_tensor = torch.distributed.distributed_c10d._tensor_to_object = None
torch.set_default_dtype(torch.float64)

# Forked from one process that has imported everything already, as that one is from the tests'.
for row in METHODS:
    METHODS.load(row.name)
port = free_port()
rank = int(os.fork() == 0)
be_one_of(2, rank, port)

noted: dict[str, dict] = {}
now: dict = {}


def shares(job: Job, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What this process holds, counted from the tensors themselves."""

    def local(tensor: torch.Tensor) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()

    trained, blocks = job.student.trained, tuple(f"{block.block}." for block in job.student.anatomy.blocks)
    inside = [(name, p) for name, p in job.student.model.named_parameters() if name.startswith(blocks)]
    frozen = [p for name, p in inside if name not in trained]
    tuned = [p for name, p in inside if name in trained and "remap_" not in name and p.ndim > 1]
    moments = [optimizer.state[p]["exp_avg"] for p in tuned]
    return {
        **{"frozen": sum(p.numel() for p in frozen), "frozen_here": sum(map(local, frozen))},
        **{"tuned": sum(p.numel() for p in tuned), "tuned_here": sum(map(local, tuned))},
        **{"moments_here": sum(map(local, moments)), "bytes": bytes_held(job.student)},
    }


evaluate, finish = epoch_recorder.evaluate_as, loop._finish_epoch


def evaluating(*arguments, **more):
    found = evaluate(*arguments, **more)
    now.setdefault("counts", []).append([found.correct, found.count])
    return found


def finishing(training: Training) -> None:
    now["shares"] = shares(training.job, training.optimizer)
    now["teachers"] = [bytes_held(teacher.network) for teacher in training.job.teachers]
    if entry.get("stop") and training.state.epoch == 1 and rank == 1:
        signal.raise_signal(signal.SIGTERM)
    finish(training)


epoch_recorder.evaluate_as, loop._finish_epoch = evaluating, finishing
for entry in plan:
    now = noted[entry["name"]] = {}
    output = folder / entry["name"]
    if entry.get("resume"):
        result = run.resume(output)
    else:
        recipe = resolve(words=entry["words"], settings=entry["settings"])
        try:
            result = run.start(recipe, output)
        except Interrupted:
            now["interrupted"] = True
            continue
    # Nothing that leaves a run is sharded: one process may use it on its own.
    now["plain"] = not any(isinstance(p, DTensor) or not p.numel() for p in result.student.model.parameters())
    now["hooked"] = [type(m).__name__ for m in result.student.model.modules() if type(m).__name__.startswith("FSDP")]
(folder / f"noted-{rank}.json").write_text(json.dumps(noted))
if rank == 0:
    os.wait()
