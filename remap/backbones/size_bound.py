"""The one bound on what a model may take, counted while it is built on the meta device, where nothing takes memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from remap.errors import WeightsError
from remap.io.tensor_files import FREE_BYTES, MOST_UNPACKED

# Buffers are not all stored: BEiT's tables of relative positions grow with the fourth power of the image's side, and
# at 1536 x 1536 pixels take 47 times a file in float16.
MOST_TABLES = 64
# timm's largest have some 5,000.
MOST_MODULES = 20_000
# What initialises weights. Tensors without values stay as they are; to work out their shapes takes half of the time.
_IN_PLACE = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
INITIALISES = {getattr(Tensor, name) for name in _IN_PLACE}


class _Uninitialised(TorchFunctionMode):
    """Leave out what gives tensors their first values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in INITIALISES and args[0].is_meta else func(*args, **(kwargs or {}))


@contextmanager
def bounded(name: str, stored: int | None) -> Iterator[None]:
    """Build on the meta device, and stop as soon as a model is far larger than the file it is read from.

    Args:
        name: As messages call it.
        stored: Bytes of the weights on the disk; None for those that are not there to compare with.

    Raises:
        WeightsError: It is far larger, or has more modules than any model of timm.
    """
    counts = {"modules": 0, "parameters": 0, "buffers": 0}
    limits = {"modules": MOST_MODULES}
    if stored is not None:
        limits["parameters"] = MOST_UNPACKED * stored + FREE_BYTES
        limits["buffers"] = MOST_TABLES * stored + FREE_BYTES

    def counter(what: str) -> Any:
        def count(_module: Any, _name: str, part: Any) -> None:
            counts[what] += 1 if what == "modules" else 0 if part is None else part.nbytes
            if counts[what] > limits.get(what, counts[what]):
                unit = "" if what == "modules" else " bytes of"
                raise WeightsError(
                    f"'{name}' describes a model that its weights do not fit",
                    given=f"more than {limits[what]:,}{unit} {what}"
                    + ("" if stored is None else f"; {stored:,} bytes of weights on the disk"),
                    do="name the model that these weights belong to; where image_size was chosen, a smaller one",
                )

        return count

    handles = [
        hooks.register_module_module_registration_hook(counter("modules")),
        hooks.register_module_parameter_registration_hook(counter("parameters")),
        hooks.register_module_buffer_registration_hook(counter("buffers")),
    ]
    try:
        with torch.device("meta"), _Uninitialised():
            yield
    finally:
        for handle in handles:
            handle.remove()
