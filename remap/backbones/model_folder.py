"""Model folders as timm writes them: config.json and weights, which may come from anybody. Nothing is built here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm

from remap.errors import WeightsError
from remap.io.checked_read import plain, read_json

# A model folder's config.json: names and numbers, and at most 22 thousand names of classes with their descriptions.
MOST_CONFIG_BYTES = 16 * 2**20
# Of a shape in a config.json, and of the blocks of a model.
LARGEST_NUMBER, MOST_BLOCKS = 2**17, 200
# Arguments of timm's factory that say where to read or what to download; a model folder has no need of them.
_NOT_FOR_FOLDERS = ("pretrained", "checkpoint", "cache_dir", "scriptable", "exportable", "no_jit", "features_only")


def require_model_folder(folder: Path, weights: str) -> Path | None:
    """A model folder holds names and numbers in config.json and its weights in safetensors files, no pickles.

    Returns:
        The largest of the files, where the weights are those of the folder.

    Raises:
        WeightsError: It does not; nothing of it was built.
    """
    path = folder / "config.json"
    try:
        _require_described(read_json(path, MOST_CONFIG_BYTES))
    except ValueError as error:
        raise WeightsError(f"cannot read {path}: {plain(str(error))}", do="see timm's save_for_hf") from error
    if weights != "pretrained":
        return None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            f"{folder} holds no weights in safetensors files",
            given=", ".join(plain(file.name) for file in sorted(folder.iterdir())[:5]),
            do="pickled checkpoints (.pt, .pth, .bin) are not read; convert them with safetensors.torch.save_file",
        )
    return max(files, key=lambda file: file.stat().st_size)


def _require_described(config: Any) -> None:
    """A config.json names an architecture and its arguments.

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
            raise ValueError(f"'model_args.{name[:80]}' is no argument of a model")
        for number in _numbers(value):
            limit = MOST_BLOCKS if name in ("depth", "depths", "layers") else LARGEST_NUMBER
            if not abs(number) <= limit:
                raise ValueError(f"'model_args.{name[:80]}' is larger than {limit:,}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, (int, float)):
        yield value
