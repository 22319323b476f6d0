"""The format of a task folder, and its checks, since a task may come from a stranger.

``task.json`` names the backbone, the method, the classes, the preprocessing, and the SHA-256 of ``task.safetensors``,
which holds what was trained; its last entry is its own SHA-256 (``remap.io.sealed_json``).
"""

import json
import os
import warnings
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, FailFast, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remap.backbones.names import is_weights_file
from remap.backbones.preprocess import PreprocessSpec
from remap.data import CLASSES
from remap.data.views import FILTERS, View
from remap.errors import RemapWarning, RunError
from remap.io.checked_json import MOST_JSON_BYTES
from remap.io.checked_read import open_regular, read_regular, sha256_of
from remap.io.names import name_problem, plain
from remap.io.sealed_json import parse_sealed
from remap.io.tensor_files import read_safetensors
from remap.network import Network
from remap.recipe.schema import LARGEST_SIDE, MethodSpec, ModelSpec, PathOrName
from remap.runs.run_dir import RunDir, not_a_folder, require_there, see_runs

FORMAT, FORMAT_OF_SETS = 1, 2  # of task multilabel, which earlier versions would read as one class an image
MOST_CLASSES = 1_000_000
# Sizes that a method's options may ask for whatever the file holds; larger ones must be a size of one of its tensors.
FREE_SIZE = 4096
# Of a tensor; torch computes with at most 64.
MOST_DIMENSIONS = 16
# Bytes of task.json beside those of its tensors: each class name belongs to a row of the classifier.
FREE_JSON_BYTES = 2**20


def _class_name(name: str) -> str:
    unfit = name_problem(name)
    if unfit or not 1 <= len(name) <= 255:
        raise ValueError(f"a class name holds {unfit}" if unfit else "a class name has 1 to 255 letters")
    os.fsencode(name)  # bytes of a folder's name that are not UTF-8 are kept; half a character is a ValueError
    return name


def _require_absolute(word: str) -> str:
    """Require an absolute path or a model's name: a relative path would depend on where the task is read."""
    path = word.removeprefix("clip:").removeprefix("local-dir:")
    is_path = "local-dir:" in word or word.startswith((".", "~", "/")) or is_weights_file(word)
    if is_path and (not path.startswith("/") or ".." in path.split("/")):
        raise ValueError("should be an absolute path without '..'")
    return word


def _sized_view(view: View) -> View:
    _require_view(view)
    if problem := view.pixels.problem():
        raise ValueError(problem)
    return view


def _sized_preprocess(spec: PreprocessSpec) -> PreprocessSpec:
    _require_view(spec)
    if not all(map(isfinite, (*spec.mean, *spec.std))) or not len(spec.mean) == len(spec.std) or min(spec.std) <= 0:
        raise ValueError("mean and std should be finite, as many of each, and std above 0")
    return spec


def _require_view(view: View | PreprocessSpec) -> None:
    inside = all(1 <= side <= LARGEST_SIDE for side in view.shape[1:])
    if not inside or not 0 < view.crop_pct <= 1 or view.interpolation not in FILTERS:
        raise ValueError(f"should have 1 to {LARGEST_SIDE} pixels, a share of them, and one of {', '.join(FILTERS)}")


_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Source(BaseModel):
    model: Annotated[PathOrName, AfterValidator(_require_absolute)]
    weights: Annotated[PathOrName, AfterValidator(_require_absolute)]
    sha256: _Sha256
    preset: Literal["none", "mae", "moco_v3"]
    image_size: int | None = Field(default=None, ge=1, le=LARGEST_SIDE)

    def to_open(self, **instead: str) -> ModelSpec:
        """Return the model that ``open_backbone`` takes, with another ``model`` or ``weights`` where one is named."""
        return ModelSpec(**{**self.model_dump(exclude={"sha256"}), **instead})


class TaskMeta(BaseModel):
    """The content of task.json."""

    format: Literal[1, 2]  # FORMAT, FORMAT_OF_SETS
    backbone: _Source
    method: MethodSpec
    # None where there is no classifier.
    classes: Annotated[tuple[Annotated[str, AfterValidator(_class_name)], ...], FailFast()]
    preprocess: Annotated[PreprocessSpec, AfterValidator(_sized_preprocess)]
    view: Annotated[View, AfterValidator(_sized_view)]
    holds_backbone: bool
    # Not in the files of earlier versions, whose students answer with one class.
    task: Literal["classes", "multilabel"] = CLASSES
    sha256: _Sha256


def folder_of(path: Path) -> Path:
    """Return the task folder of a run directory; a task folder itself is returned as it is.

    Raises:
        RunError: It is a run directory without a student, or an adapter of PEFT.
    """
    folder = path / "task" if os.path.isdir(path / "task") else path
    if os.path.isfile(folder / "task.json"):
        return folder
    if os.path.isfile(path / "recipe.yaml"):
        raise _unfinished(path)
    if os.path.isfile(path / "adapter_config.json"):
        raise RunError(
            f"{path} is an adapter of PEFT, not a task of remap",
            given="adapter_config.json, which does not say what backbone, classes and preprocessing it is for",
            do="load it with PEFT, merge it (merge_and_unload) into its timm model, save that with timm's save_for_hf,"
            " and name it: --student local-dir:FOLDER",
        )
    return folder


def _unfinished(path: Path) -> RunError:
    """Return the error for a run directory without a student, with how its run ended."""
    run = RunDir(path)
    if os.path.isfile(path / "status.json") and run.is_done:
        return RunError(
            f"{run.task / 'task.json'} is missing; the run itself is finished",
            do=f"copy the task folder again, or write it from the last checkpoint: {run.resume_command()}",
        )
    ended, message = run.outcome()
    # Of the checkpoints of an earlier part nothing is left, so it cannot be resumed (``pipeline.run``).
    if os.path.isfile(path / "metrics.jsonl") and not any(run.checkpoint.glob("*.json")):
        again = "start the run again in another --output, or name another run"
        return RunError(f"{path} holds no tuned student: its run {ended}", given=message, do=again)
    # A run that was killed leaves no message.
    stored = "" if message is None else f"{path / 'status.json'} has the complete message; "
    return RunError(
        f"{path} holds no tuned student: its run {ended}",
        given=message,
        do=f"{stored}resume with: {run.resume_command()}, or name another run",
    )


def read_meta(folder: Path) -> TaskMeta:
    """Read the task.json of a folder.

    Raises:
        RunError: task.json is missing, damaged or of another version.
    """
    path = folder / "task.json"
    if not any(os.path.lexists(folder / name) for name in ("task.json", "task.safetensors")):
        # Both: `remap init` writes a recipe.yaml where the user is, which is not a run.
        is_run = all(os.path.isfile(folder.parent / name) for name in ("recipe.yaml", "status.json"))
        if is_run and folder.name == "task":
            raise _unfinished(folder.parent)
        require_there(folder)
        given = "it has neither recipe.yaml nor task.json" if os.path.isdir(folder) else not_a_folder(folder)
        what = f"{plain(str(folder))} is not a run directory or task folder"
        raise RunError(what, given=given, do=see_runs(folder))
    try:
        values, sealed = parse_sealed(read_regular(path, _most_bytes(folder)))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else plain(str(error))
        raise RunError(f"cannot read {path}: {reason}", do=_again(folder)) from error
    # With one letter changed, the name of the seal would be an unknown entry.
    strange = set() if sealed or not isinstance(values, dict) else values.keys() - {*TaskMeta.model_fields, "remap"}
    try:
        meta = TaskMeta.model_validate(values)
    except ValidationError as error:
        strange |= {".".join(map(str, problem["loc"])) or "everything" for problem in error.errors()}
    if strange:
        names = ", ".join(map(plain, sorted(strange)[:8]))[:400]
        raise RunError(
            f"{path} is not a task of this version of remap",
            given=f"{json.dumps(values)[:80]} (wrong, missing or unknown: {names})",
            allowed=f"format {FORMAT} or {FORMAT_OF_SETS}",
        )
    if not sealed:
        what = f"{path} is not sealed: an earlier version of remap wrote it, and changes of its text cannot be noticed"
        warnings.warn(what, RemapWarning, stacklevel=2)
    return meta


def _most_bytes(folder: Path) -> int:
    try:
        tensors = os.stat(folder / "task.safetensors").st_size
    except (OSError, ValueError):  # which the reading of the tensors explains
        tensors = 0
    return min(MOST_JSON_BYTES, FREE_JSON_BYTES + tensors)


def read_tensors(folder: Path, meta: TaskMeta) -> dict[str, Tensor]:
    """Read the tensors of task.safetensors.

    Raises:
        RunError: The file is missing, or does not match its SHA-256 in task.json.
    """
    path = folder / "task.safetensors"
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt"):  # a header that does not fit the length costs no hash of gigabytes
            digest = sha256_of(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        what = f"cannot read {path}: {reason}" if reason else f"{path} is damaged: cannot read its header"
        raise RunError(what, given=None if reason else plain(str(error))[:200], do=_again(folder)) from error
    if digest != meta.sha256:
        raise RunError(f"{path} is damaged: its SHA-256 differs from task.json", do=_again(folder))
    return read_safetensors(path)


def _again(folder: Path) -> str:
    """Return how to get a damaged task back."""
    run = RunDir(folder.parent)
    copy = "copy the task folder again"
    if folder.name != "task" or not run.checkpoint.is_dir():
        return copy
    return f"{copy}, or write it from the last checkpoint of its run: {run.resume_command()}"


# Options of methods that are whole numbers and size no tensor, and the largest of them: what PyTorch takes for a seed.
_NO_SIZES, _LARGEST = ("seed", "alpha", "interval"), 2**63 - 1


def require_sizes(folder: Path, meta: TaskMeta, tensors: dict[str, Tensor]) -> None:
    """Bound what is built by the file's tensors: a few bytes cannot ask for a million classes or a huge rank."""
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    if meta.classes and (len(meta.classes) not in sizes or len(meta.classes) > MOST_CLASSES):
        raise RunError(f"the classifier in {folder} does not fit its {len(meta.classes):,} class names")
    if len(set(meta.classes)) < len(meta.classes):
        raise RunError(f"{folder / 'task.json'} names a class twice")
    unfit = next((name for name, t in tensors.items() if not name.isprintable() or t.ndim > MOST_DIMENSIONS), None)
    if unfit is not None:
        given = f"{plain(unfit)[:200]} of {tensors[unfit].ndim} dimensions"
        raise RunError(f"{folder} holds a tensor that cannot be a parameter", given=given)
    largest = max(FREE_SIZE, *sizes)
    numbers = _numbers(meta.method.options)
    strange = [number for number, sizes in numbers if abs(number) > (largest if sizes else _LARGEST)]
    if strange:
        raise RunError(
            f"{folder / 'task.json'} has options that the tensors beside it do not fit",
            given=f"{Decimal(strange[0]):.6g}",
        )


def _numbers(value: Any, sizes: bool = True) -> list[tuple[int, bool]]:
    """Return the whole numbers among options of all levels, and whether each may size a tensor."""
    if isinstance(value, dict):
        named = ((inner, name not in _NO_SIZES) for name, inner in value.items())
        return [number for inner, sizes in named for number in _numbers(inner, sizes)]
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner, sizes)]
    return [(value, sizes)] if isinstance(value, int) else []


def require_finite(network: Network, tensors: dict[str, Tensor], folder: Path) -> None:
    """Require finite tensors of the dtypes they were saved with. Unknown tensors are refused later."""
    own = dict(network.model.named_parameters()) | network.tensors
    known = {name: tensor for name, tensor in tensors.items() if name in own}
    for name, tensor in known.items():
        if tensor.dtype != own[name].dtype:
            raise RunError(f"{name} in {folder} is {tensor.dtype}, not {own[name].dtype}")
    bad = [name for name, t in known.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise RunError(f"{len(bad)} tensors in {folder} hold numbers that are not finite", given=plain(bad[0])[:200])
