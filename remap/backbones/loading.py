"""Where weights come from: the hub through timm's loader and cache, a file, a folder, or nowhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from remap.errors import BackboneError, WeightsError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        WeightsError: It is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"cannot read {path} as safetensors: {str(error).splitlines()[0]}",
            do="pickled checkpoints (.pt, .pth, .bin) are not read; convert them with safetensors.torch.save_file",
        ) from error


def weight_arguments(name: str, weights: str) -> dict[str, Any]:
    if weights in ("none", "pretrained"):
        return {"pretrained": weights == "pretrained"}
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise WeightsError(
            "unknown source of weights", given=weights, allowed="pretrained, none, or a .safetensors file"
        )
    tensors = read_safetensors(path)
    head = tensors.get("head.weight")
    classes = 0 if head is None else head.shape[0]
    overlay = {"file": str(path), "custom_load": False, "num_classes": classes}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": classes}


def create(name: str, weights: str, arguments: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """Build a model through timm.

    Returns:
        The model, and the names of its tensors that the weights did not hold.
    """
    missing: list[str] = []
    if weights == "pretrained":
        cached = in_cache_or_reachable(name)
        if cached is not None:
            # Named as a file, timm loads it without asking the hub, which takes long where there is no network.
            arguments = {**arguments, "pretrained_cfg_overlay": {"file": cached, "custom_load": False}}
    try:
        with _noting_missing(missing):
            return timm.create_model(name, **arguments), missing
    except Exception as error:  # timm, the hub client and torch raise many kinds here
        if not arguments["pretrained"]:
            raise BackboneError(f"timm cannot build '{name}': {error}") from error
        if weights != "pretrained":
            raise WeightsError(f"{weights} does not fit '{name}': {_first_lines(error)}") from error
        raise _out_of_reach(name, error) from error


@contextmanager
def _noting_missing(missing: list[str]) -> Iterator[None]:
    """timm loads with ``strict=False`` when the number of classes differs, and then says nothing of what is missing."""
    original = nn.Module.load_state_dict

    def load_state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = original(module, *args, **kwargs)
        missing.extend(found.missing_keys)
        return found

    nn.Module.load_state_dict = load_state_dict
    try:
        yield
    finally:
        nn.Module.load_state_dict = original


def in_cache_or_reachable(name: str) -> str | None:
    """The cached weights file of a hub model; None for other models, and when the hub answers and timm may download.

    Raises:
        WeightsError: Not in the cache, and one request says that the hub is out of reach.
    """
    config = None if ":" in name else timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        if config is not None and config.file and not Path(config.file).is_file():
            raise WeightsError(f"the shipped weights of {name} are missing", given=config.file, do="reinstall remap")
        return None
    repository = _repository(name, config)
    names = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    for file in (config.hf_hub_filename, *names) if config.hf_hub_filename else names:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return cached
    try:
        HfApi().model_info(repository, timeout=10)
    except Exception as error:  # no network, offline by setting, no such or a gated repository
        raise _out_of_reach(name, error) from error
    return None


def _repository(name: str, config: Any) -> str:
    hub_id = config.hf_hub_id
    return f"{hub_id}{name}" if hub_id.endswith("/") else hub_id


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _out_of_reach(name: str, error: Exception) -> WeightsError:
    if name.startswith("local-dir:"):
        return WeightsError(f"cannot load {name}: {_first_lines(error)}")
    config = None if ":" in name else timm.get_pretrained_cfg(name)
    if config is not None and config.file:
        return WeightsError(f"cannot load {config.file}: {_first_lines(error)}", do="reinstall remap")
    if config is not None and not config.hf_hub_id and not config.url:
        return WeightsError(f"timm has no weights for '{name}'", do="choose another tag, or --weights none")
    if config is None:
        repository = name.partition(":")[2]
    else:
        repository = _repository(name, config) if config.hf_hub_id else config.url
    return WeightsError(
        f"the weights of {name} are not in the cache, and the hub is out of reach",
        given=f"repository {repository}, cache {HF_HUB_CACHE} ({type(error).__name__}: {_first_lines(error)[:160]})",
        do="\n           ".join(
            [
                f"where there is a network: `hf download {repository}`, then copy the cache here or set HF_HOME;",
                "or name a folder or file you have: local-dir:FOLDER, --set student.weights=FILE.safetensors;",
                "or build it with random weights: --weights none",
            ]
        ),
    )
