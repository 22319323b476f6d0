"""A run in several processes, for tests/cache/test_teacher_cache.py; each notes what it computed and what it holds."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from remap.cache import teacher_cache
from remap.distributed.launch import accelerator
from remap.pipeline import run
from remap.pipeline.run import start
from remap.recipe import resolve

count, output, words, settings = json.loads(sys.argv[1])

torch.set_num_threads(1)
noted: dict[str, Any] = {"asked": 0}
items_of, fit = teacher_cache.outputs_of, run.train
tensors: dict[str, torch.Tensor] = {}


def counting(teacher: Any, images_BCHW: torch.Tensor, *sizes: int) -> dict[str, torch.Tensor]:
    noted["asked"] += int((images_BCHW != 0).flatten(1).any(dim=1).sum())
    return items_of(teacher, images_BCHW, *sizes)


def noting(job: Any, **words: Any) -> Any:
    _, everything = job.source.batch(np.arange(len(job.source.split)))
    for view in range(job.recipe.data.views or 1):
        tensors.update({f"{name}.{view}": rows for name, rows in job.teachers[0].cached.rows(everything, view).items()})
    if job.features is not None:
        tensors.update({f"feature.{name}": rows for name, rows in job.features.rows(everything).items()})
    state = fit(job, **words)
    noted["bad"] = sorted(job.source.bad)
    return state


teacher_cache.outputs_of, run.train = counting, noting
result = start(resolve(words=words, settings=settings), output)
noted["summary"] = [name for name, _ in result.summary["data"]["skipped"]]
rank = accelerator().process_index
save_file(tensors, f"{output}-{count}-{rank}.safetensors")
Path(f"{output}-{count}-{rank}.json").write_text(json.dumps(noted))
