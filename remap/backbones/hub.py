"""Weights of timm's own models: shipped with remap, in the hub's cache, or a download away."""

from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from remap.errors import WeightsError
from remap.io.tensor_files import first_lines


def in_cache_or_reachable(name: str) -> str | None:
    """Return the shipped or cached weights file of a model; None for others, and where the hub answers: timm downloads.

    Raises:
        WeightsError: Not in the cache, and one request says that the hub is out of reach.
    """
    config = None if ":" in name else timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        if config is not None and config.file and not Path(config.file).is_file():
            raise WeightsError(f"the shipped weights of {name} are missing", given=config.file, do="reinstall remap")
        return config.file if config is not None else None
    repository = _repository(name, config)
    names = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    for file in (config.hf_hub_filename, *names) if config.hf_hub_filename else names:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return cached
    try:
        HfApi().model_info(repository, timeout=10)
    except Exception as error:  # no network, offline by setting, no such or a gated repository
        raise out_of_reach(name, error) from error
    return None


def licence_of(name: str) -> str | None:
    """Return the licence that timm's configuration names for a model's weights; None where it names none."""
    config = None if ":" in name else timm.get_pretrained_cfg(name)
    return config.license if config is not None else None


def _repository(name: str, config: Any) -> str:
    hub_id = config.hf_hub_id
    return f"{hub_id}{name}" if hub_id.endswith("/") else hub_id


def out_of_reach(name: str, error: Exception) -> WeightsError:
    """Return the error for weights that are neither here nor to be had, with the ways on."""
    config = None if ":" in name else timm.get_pretrained_cfg(name)
    if config is not None and config.file:
        return WeightsError(f"cannot load {config.file}: {first_lines(error)}", do="reinstall remap")
    if config is not None and not config.hf_hub_id and not config.url:
        return WeightsError(f"timm has no weights for '{name}'", do="choose another tag, or --weights none")
    if config is None:
        repository = name.partition(":")[2]
    else:
        repository = _repository(name, config) if config.hf_hub_id else str(config.url)
    return WeightsError(
        f"the weights of {name} are not in the cache, and the hub is out of reach",
        given=f"repository {repository}, cache {HF_HUB_CACHE} ({type(error).__name__}: {first_lines(error)[:160]})",
        do="\n           ".join(
            [
                f"where there is a network: `hf download {repository}`, then copy the cache here or set HF_HOME;",
                "or name a folder or file you have: local-dir:FOLDER, --set student.weights=FILE;",
                "or build it with random weights: --weights none",
            ]
        ),
    )
