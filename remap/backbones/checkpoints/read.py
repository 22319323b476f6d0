"""Checkpoints as training scripts write them: tensors below wrappers and prefixes, with what else they say."""

import argparse
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from remap.backbones.names import WEIGHTS_FILES
from remap.errors import WeightsError
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.io.tensor_files import FREE_BYTES, MOST_UNPACKED, first_lines, read_metadata, read_safetensors, stored_bytes

SOURCES = f"pretrained, none, or a file: {', '.join(WEIGHTS_FILES)}"
# Where a checkpoint has several sets of weights the first of these is taken: running averages come before what was
# trained, as in the authors' own evaluations (timm's --use-ema, DINO's teacher).
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder",
    "state_dict", "model_state_dict", "model", "student", "network", "net", "backbone", "encoder", "module", "weights",
)  # fmt: skip
# Entries that are looked into for tensors.
_MOST_ENTRIES = 100
# What frameworks put in front of every key, in the order in which they are taken away.
PREFIXES = ("module.", "_orig_mod.", "ema.", "teacher.", "model.", "student.", "backbone.", "encoder.")
# Only pre-training needs it. A mask token stays: timm's filters know DINOv2 by it.
_PRETRAINING = ("decoder_", "dino_head.", "ibot_head.", "projector.", "predictor.", "lm_head.")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        tensors: Under the names in the file, without wrappers.
        architecture: Name of timm that the file gives; None where it gives none.
        labels: Names of the outputs, where the file gives them.
        notes: What a user should know: which of several sets of weights was taken.
    """

    tensors: dict[str, Tensor]
    architecture: str | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of weights; a pickle with ``weights_only=True`` alone, so that it can hold tensors but run nothing.

    Raises:
        WeightsError: It cannot be read so; the error has the line that converts it.
    """
    if not path.name.endswith(WEIGHTS_FILES):
        raise WeightsError("unknown source of weights", given=plain(str(path)), allowed=SOURCES)
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        return Checkpoint(tensors, _architecture(read_metadata(path)))
    values = _unpickled(path)
    tensors, notes = _unwrapped(values, path.name)
    if not tensors:
        raise WeightsError(f"{path} holds no tensors", given=f"keys {some_of(values)}", allowed=", ".join(WRAPPERS))
    if sum(tensor.nbytes for tensor in tensors.values()) > MOST_UNPACKED * stored_bytes(path) + FREE_BYTES:
        raise WeightsError(f"{path} describes tensors far larger than the file", given=f"{stored_bytes(path):,} bytes")
    return Checkpoint(tensors, _architecture(values), _labels(values), notes)


def stripped(tensors: dict[str, Tensor], fits: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take prefixes away until the keys fit, and what only pre-training needs.

    Args:
        fits: Whether tensors are named as a model or a layout names them.

    Returns:
        The tensors, and notes of what was left out.
    """
    notes = []
    while not fits(tensors):
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            break
        others = [key for key in tensors if not key.startswith(prefix)]
        if others:
            notes.append(f"left out {number_of(len(others), 'tensor')} beside those of '{prefix}': {some_of(others)}")
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    unused = [key for key in tensors if key.startswith(_PRETRAINING)]
    if unused:
        notes.append(f"left out {number_of(len(unused), 'tensor')} only for pre-training: {some_of(unused)}")
    return {key: tensor for key, tensor in tensors.items() if key not in unused}, tuple(notes)


def _unpickled(path: Path) -> Mapping[str, Any]:
    try:
        _require_stored_zip(path)
        # A namespace of options, as timm's and DINO's scripts store it, is names and values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch's unpickler raises many kinds; what it advises is not safe
        with open(path, "rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != b"\x80":  # of a zip, and of a pickle, as torch.save wrote before
            do = f"name a file of weights: {', '.join(WEIGHTS_FILES)}"
            raise WeightsError(f"{path} is not a file that PyTorch wrote", do=do) from error
        raise WeightsError(
            f"{path} cannot be read as tensors alone (torch.load with weights_only=True)",
            given=first_lines(error).partition("In PyTorch 2.6")[0][:160],
            do=f"convert it once. This runs what the file says, so do it only if you trust its author:\n{_line(path)}",
        ) from error
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise WeightsError(f"{path} holds no mapping of names to tensors", given=type(values).__name__)
    return values


def _require_stored_zip(path: Path) -> None:
    """Check that a checkpoint's zip is not compressed, as torch writes it: a few bytes may unpack to gigabytes."""
    stored = stored_bytes(path)  # refuses holes
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_UNPACKED * stored + FREE_BYTES:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")


def _line(path: Path) -> str:
    """Return a command that writes the weights of a pickled checkpoint as safetensors."""
    wrappers = tuple(WRAPPERS[:2] + WRAPPERS[6:9])
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"c = torch.load({str(path)!r}, 'cpu', weights_only=False); "
        f"c = next((c[k] for k in {wrappers} if isinstance(c, dict) and c.get(k)), c); "
        "c = c.state_dict() if hasattr(c, 'state_dict') else c; "
        "save_file({k: t.detach().clone().contiguous() for k, t in c.items() if torch.is_tensor(t)}, "
        f"{str(path.with_name(path.name.split('.')[0] + '.safetensors'))!r})"
    )
    return f"           python -c {shlex.quote(code)}"


def _unwrapped(values: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes = []
    for _ in range(len(WRAPPERS)):
        found = [key for key in WRAPPERS if _holds_tensors(values.get(key), set())]
        if not found:
            break
        if len(found) > 1:
            notes.append(f"{name} has the weights {', '.join(found)}: '{found[0]}' is taken")
        values = values[found[0]]
    return {key: t for key, t in values.items() if isinstance(key, str) and isinstance(t, Tensor)}, tuple(notes)


def _holds_tensors(values: Any, seen: set[int]) -> bool:
    """Whether an entry holds tensors by name: "teacher" may be settings, "ema" a decay and a list.

    Args:
        seen: Identities of what was looked into: an entry may hold itself, or very many inside one another.
    """
    if not isinstance(values, Mapping) or id(values) in seen or len(seen) == _MOST_ENTRIES:
        return False
    seen.add(id(values))
    if any(isinstance(one, Tensor) for one in values.values()):
        return True
    return any(_holds_tensors(values.get(key), seen) for key in WRAPPERS)


def _architecture(values: Mapping[str, Any]) -> str | None:
    """Return the model that a checkpoint names under the words of training scripts, if timm has it."""
    args = values.get("args", values.get("hyper_parameters", {}))
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    words = ("architecture", "arch", "model_name", "model")
    named = [place.get(word) for place in (values, args) for word in words]
    return next((name for name in named if isinstance(name, str) and timm.is_model(name)), None)


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the outputs, as a list or as torchvision's ``class_to_idx``."""
    index = values.get("class_to_idx")
    if isinstance(index, Mapping) and sorted(index.values(), key=str) == sorted(range(len(index)), key=str):
        return tuple(str(name) for name, _ in sorted(index.items(), key=lambda item: item[1]))
    names = next((values[key] for key in ("classes", "class_names", "label_names") if key in values), ())
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()


def some_of(keys: Any) -> str:
    """Return the first three keys in words."""
    names = [plain(str(key))[:60] for key in keys]
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
