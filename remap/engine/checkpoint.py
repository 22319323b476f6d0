"""Checkpoints: what is trained, the optimiser and the counters, in one safetensors file written atomically.

There is no generator state to keep: order, augmentation and dropout are functions of (seed, epoch, image).
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from remap.errors import RunError
from remap.files import make_folder, write_bytes


@dataclass
class State:
    """Where training stands. ``step`` counts steps done in ``epoch``; sums are over those steps.

    Attributes:
        digest: The recipe this belongs to.
        history: One record for each finished epoch.
        loss_sums: Sum over the steps of this epoch of each loss, as exact floats.
        seconds: Training time so far.
    """

    digest: str
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    path: Path,
    state: State,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    memory: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what is trained (parameters and buffers), the optimiser's state by name, and ``state``.

    Args:
        memory: What a method remembers from step to step (``Attached.memory``).
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    for name, tensor in (memory or {}).items():
        tensors[f"memory/{name}"] = tensor.detach().cpu().contiguous()
    make_folder(path.parent)
    for stray in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while it wrote
        stray.unlink(missing_ok=True)
    text = json.dumps(asdict(state))
    write_bytes(path, save(tensors, metadata={"state": text, "crc32": str(_crc32(text, tensors))}))


def _crc32(text: str, tensors: Mapping[str, Tensor]) -> int:
    """A checksum over the state and all tensors: safetensors itself does not notice a flipped bit."""
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return value


def load_checkpoint(
    path: Path, digest: str, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[State, dict[str, Tensor]]:
    """Put a checkpoint back into the tensors of ``trained`` and the optimiser.

    Returns:
        The state, and the method's memory as it was saved.

    Raises:
        RunError: It is damaged, belongs to another recipe, or does not fit the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata["crc32"] != str(_crc32(metadata["state"], tensors)):
            raise ValueError("its checksum differs")
        state = State(**json.loads(metadata["state"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}", do="start the run again in another --output") from error
    if state.digest != digest:
        raise RunError(
            f"{path} belongs to another recipe or to other images",
            given=f"checkpoint {state.digest}, this run {digest}",
            do="resume with the recipe the run was started with (its recipe.yaml)",
        )
    wanted = {f"parameter/{name}": p.shape for name, p in trained.items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameter/")}
    if wanted != found:
        different = sorted(set(wanted.items()) ^ set(found.items()), key=str)[:4]
        raise RunError(f"{path} does not fit this model", given=str(different))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            if isinstance(parameter, nn.Parameter):
                _load_optimizer_state(optimizer, name, parameter, tensors)
    memory = {key.removeprefix("memory/"): value for key, value in tensors.items() if key.startswith("memory/")}
    return state, memory


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor]
) -> None:
    keys = [key for key in tensors if key.startswith("optimizer/") and key.split("/", 2)[2] == name]
    for key in keys:
        field_name = key.split("/", 2)[1]
        device = parameter.device if tensors[key].ndim or parameter.is_cuda else "cpu"
        optimizer.state[parameter][field_name] = tensors[key].to(device)
