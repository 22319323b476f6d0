"""remap: distil a large vision transformer into a small one tuned by a parameter-efficient method.

    result = remap.distill({"teacher": "vit_large", "student": "vit_small", "method": "vpt_deep", "data": "FOLDER"})
    attached = remap.attach(model, "vpt_deep", num_prompts=10)
    student = remap.load_student("runs/digits-vpt_deep-001")

The function ``remap.distill`` lives in ``remap.running`` (a module of its name would hide it).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from remap.api import Student as Student
    from remap.api import attach as attach
    from remap.api import load_student as load_student
    from remap.errors import RemapError as RemapError
    from remap.running import Result as Result
    from remap.running import distill as distill

# Public name -> module. Importing remap imports none of them, and so no torch.
_PUBLIC = {
    "RemapError": "remap.errors",
    "Result": "remap.running",
    "Student": "remap.api",
    "attach": "remap.api",
    "distill": "remap.running",
    "load_student": "remap.api",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'remap' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
