"""remap: distil a large vision transformer into a small one tuned by a parameter-efficient method.

    result = remap.distill({"teacher": "vit_large", "student": "vit_small", "method": "vpt_deep", "data": "FOLDER"})
    attached = remap.attach(model, "vpt_deep", num_prompts=10)
    student = remap.load_student("runs/digits-vpt_deep-001")

The function ``remap.distill`` lives in ``remap.pipeline.run`` (a module of its name would hide it).
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# MKL may choose a kernel by the address of a matrix, so that equal rows differ in their last bits by their position in
# a batch. Its reproducible mode makes them equal, without a measurable cost. MKL reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO")

# OpenMP's threads wait for each other after each operation, and GNU's spin for milliseconds before they sleep: where
# another program has one of the cores they spin most of the time, and a step takes many times as long
# (benchmarks/busy_machine.py). A tenth of that is longer than what lies between two operations. Read when torch is
# loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

if TYPE_CHECKING:
    from remap.engine.callback import Callback as Callback
    from remap.errors import RemapError as RemapError
    from remap.pipeline.adapt import adapt as adapt
    from remap.pipeline.commands import compare as compare
    from remap.pipeline.commands import evaluate as evaluate
    from remap.pipeline.commands import recommend as recommend
    from remap.pipeline.commands import shrink as shrink
    from remap.pipeline.commands import tune as tune
    from remap.pipeline.extend import extend as extend
    from remap.pipeline.find_lr import find_lr as find_lr
    from remap.pipeline.own_loop import losses as losses
    from remap.pipeline.run import Result as Result
    from remap.pipeline.run import distill as distill
    from remap.pipeline.student_api import Student as Student
    from remap.pipeline.student_api import attach as attach
    from remap.pipeline.student_api import load_student as load_student
    from remap.plugins import register as register
    from remap.prediction.predict import predict as predict
    from remap.tasks.multi_task import MultiTask as MultiTask
    from remap.tasks.shelf import Shelf as Shelf

# Public name -> module. Importing remap imports none of them, and so no torch.
_PUBLIC = {
    "Callback": "remap.engine.callback",
    "MultiTask": "remap.tasks.multi_task",
    "RemapError": "remap.errors",
    "Result": "remap.pipeline.run",
    "Shelf": "remap.tasks.shelf",
    "Student": "remap.pipeline.student_api",
    "adapt": "remap.pipeline.adapt",
    "attach": "remap.pipeline.student_api",
    "compare": "remap.pipeline.commands",
    "distill": "remap.pipeline.run",
    "evaluate": "remap.pipeline.commands",
    "extend": "remap.pipeline.extend",
    "find_lr": "remap.pipeline.find_lr",
    "load_student": "remap.pipeline.student_api",
    "losses": "remap.pipeline.own_loop",
    "predict": "remap.prediction.predict",
    "recommend": "remap.pipeline.commands",
    "register": "remap.plugins",
    "shrink": "remap.pipeline.commands",
    "tune": "remap.pipeline.commands",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'remap' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
