"""Where a model's description is: a name of timm, or a folder of timm, transformers or open_clip."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from remap.backbones.checkpoints import open_clip, transformers_config
from remap.backbones.checkpoints.layout import Described
from remap.backbones.checkpoints.read import read_checkpoint
from remap.backbones.names import is_weights_file
from remap.errors import WeightsError
from remap.io.checked_json import read_json
from remap.io.names import plain
from remap.io.paths import expanded

# A config.json: names and numbers, and at most 22 thousand names of classes with their descriptions.
MOST_CONFIG_BYTES = 16 * 2**20
# Of all numbers of one argument in a config.json together.
LARGEST_NUMBER = 2**17
# Arguments of timm's factory that say where to read or what to download; a model folder has no need of them.
_NOT_FOR_FOLDERS = ("pretrained", "checkpoint", "cache_dir", "scriptable", "exportable", "no_jit", "features_only")
CONFIGS = ("config.json", "open_clip_config.json")
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")


def describe(name: str) -> Described:
    """Return what is known of a model before it is built; a name of timm is all there is to say of it.

    Args:
        name: A name of timm, or ``local-dir:FOLDER``.

    Raises:
        WeightsError: The folder describes no model, or asks for more than a shape.
    """
    if not name.startswith("local-dir:"):
        return Described(name)
    folder = Path(name.removeprefix("local-dir:"))
    path = config_in(folder)
    library = "timm" if path.name == CONFIGS[0] else "open_clip"
    try:
        config = read_json(path, MOST_CONFIG_BYTES)
        if library == "open_clip":
            return _checked(open_clip.describe(config))
        if isinstance(config, dict) and "architecture" not in config and "model_type" in config:
            library = "transformers"
            beside = folder / "preprocessor_config.json"
            preprocessor = read_json(beside, MOST_CONFIG_BYTES) if beside.is_file() else None
            return _checked(transformers_config.describe(config, preprocessor))
        _require_described(config)
    except ValueError as error:
        what = f"cannot read {path}" if library == "timm" else f"{folder}, a model folder of {library}, cannot be used"
        raise WeightsError(
            f"{what}: {plain(str(error))}",
            do="see docs/weights.md for the folders that are read, or write one with timm's save_for_hf",
        ) from error
    return Described(name)


def config_in(folder: Path) -> Path:
    """Return the description that is read of a model folder."""
    return folder / next((name for name in CONFIGS if os.path.lexists(folder / name)), CONFIGS[0])


def weights_in(folder: Path) -> Path:
    """Return the one file of a model folder that is read: safetensors, pickles never.

    Raises:
        WeightsError: There is none, or it is not clear which.
    """
    for name in _WEIGHTS:
        if os.path.lexists(folder / name):
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise WeightsError(
            f"{folder} holds several files of weights",
            given=", ".join(plain(file.name) for file in files[:5]),
            do=f"join them in {_WEIGHTS[0]}, or name one: --set student.weights=FILE (or teacher.weights)",
        )
    raise WeightsError(
        f"{folder} holds no weights in safetensors files",
        given=", ".join(plain(file.name) for file in sorted(folder.iterdir())[:5]),
        do="pickled checkpoints in a folder are not read; name the file that you trust to hold tensors alone: "
        "--set student.weights=FILE (or teacher.weights)",
    )


def named_file(word: str, weights: str) -> tuple[str, str]:
    """Return model and weights for a word that names a file of weights; other words stay as they are.

    The model is the one that the file names, else that of the config.json beside it.

    Raises:
        WeightsError: Nothing says which model it is, or weights are named besides.
    """
    if not is_weights_file(word):
        return word, weights
    if weights != "pretrained":
        raise WeightsError(f"{word} is a file of weights already", given=f"weights: {weights}", do="leave one out")
    path = expanded(word)
    architecture = read_checkpoint(path).architecture
    beside = any((path.parent / name).is_file() for name in CONFIGS)
    if architecture is None and not beside:
        raise WeightsError(
            f"{word} does not say which model its weights are for",
            given="no entry arch, model_name or args.model that timm knows, no config.json beside it",
            do=f"name the model and the file: --teacher vit_small_patch16_224 --set teacher.weights={word}"
            " (for a student, --student and student.weights)",
        )
    return architecture or f"local-dir:{path.parent.resolve()}", str(path)


def _checked(described: Described) -> Described:
    """Check a foreign description as one of timm's; ``describe`` of a library has chosen the names itself."""
    _require_described({"architecture": described.architecture, "model_args": dict(described.arguments)})
    return replace(described, config={**described.config, "source": "", "custom_load": False, "label_offset": 0})


def _require_described(config: Any) -> None:
    """Check that a config.json names an architecture and its arguments.

    Raises:
        ValueError: It describes none, or asks for more than a shape.
    """
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"'architecture' names no model of timm: {str(architecture)[:80]!r}")
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict) or not isinstance(config.get("pretrained_cfg", {}), dict):
        raise ValueError("'model_args' and 'pretrained_cfg' should be mappings")
    for name, value in arguments.items():
        if name.startswith(_NOT_FOR_FOLDERS) or not name.isidentifier():
            raise ValueError(f"'model_args.{name[:80]}' is not an argument of a model")
        if not _total(value) <= LARGEST_NUMBER:
            raise ValueError(f"'model_args.{name[:80]}' is larger than {LARGEST_NUMBER:,}")


def _total(value: Any) -> float:
    """Return the sum of the numbers in a value: one large depth, or very many small ones."""
    if isinstance(value, Mapping):
        return sum(map(_total, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_total, value))
    return abs(value) if isinstance(value, (int, float)) else 0
