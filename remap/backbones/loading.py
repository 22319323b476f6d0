"""Load weights: from the hub through timm's loader and cache, a file, a folder, or none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from remap.backbones.model_folder import require_model_folder
from remap.backbones.typed import as_timm
from remap.errors import BackboneError, WeightsError
from remap.io.checked_read import open_regular
from remap.io.names import plain

# The parameters of a model have at most this many times the bytes of its weights file: 8-bit weights in float32
# and more.
# Its buffers are not all stored: BEiT's tables of relative positions grow with the fourth power of the image's side,
# and at 1536 x 1536 pixels take 47 times a file in float16. FREE_BYTES are allowed for any file.
MOST_UNPACKED, MOST_TABLES, FREE_BYTES = 8, 64, 2**24


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file.

    Raises:
        WeightsError: It is missing, truncated or not a safetensors file.
    """
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # of strange types and sizes, torch and the reader raise many kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_lines(error)
        raise WeightsError(
            f"cannot read {path} as safetensors: {reason or type(error).__name__}",
            do="pickled checkpoints (.pt, .pth, .bin) are not read; convert them with safetensors.torch.save_file",
        ) from error


# The classifier's weight in timm's families.
HEADS = ("head.weight", "head.fc.weight", "fc.weight")


def weight_arguments(weights: str, preset: str = "none") -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` for weights of this source, read as the preset says."""
    pooling = {"mae": "avg", "moco_v3": "token"}
    # Not strict: the final norm of MAE's weights has no place in a model that pools first. What is missing is noted.
    readout = {"global_pool": pooling[preset], "pretrained_strict": False} if preset != "none" else {}
    if weights in ("none", "pretrained"):
        return {"pretrained": weights == "pretrained", **readout}
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise WeightsError(
            "unknown source of weights", given=weights, allowed="pretrained, none, or a .safetensors file"
        )
    tensors = read_safetensors(path)
    # An empty source keeps timm from preferring the weights in a local or hub folder.
    overlay: dict[str, Any] = {"file": str(path), "custom_load": False, "source": ""}
    if preset != "none":
        tensors = encoder_of(tensors, preset, str(path))
        # Both were trained with the statistics of ImageNet, even where a tag of the architecture has others.
        overlay |= {"state_dict": tensors, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    classes = next((len(tensors[key]) for key in HEADS if key in tensors), 0)
    overlay["num_classes"] = classes
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": classes, **readout}


def encoder_of(tensors: dict[str, Tensor], preset: str, where: str) -> dict[str, Tensor]:
    """Return the encoder of a self-supervised checkpoint, under timm's names and without what only pre-training needs.

    MAE (He et al. 2021, arXiv 2111.06377): decoder and mask token go, and the final norm too, because the classifier
    gets its own norm behind the pooling. MoCo v3 (Chen et al. 2021, arXiv 2104.02057): the encoder that was
    trained is taken in preference to its running average, as in the official evaluation; a checkpoint of that
    evaluation, which has neither prefix, is read too. Projector, predictor and linear head go.

    Raises:
        WeightsError: Nothing of an encoder is left.
    """
    dropped: tuple[str, ...]
    if preset == "mae":
        dropped, found = ("decoder", "mask_token", "norm.", "head."), tensors
    else:
        dropped = ("head.", "predictor.")
        prefixes = ("base_encoder.", "momentum_encoder.", "")
        bare = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
        prefix = next(prefix for prefix in prefixes if any(key.startswith(prefix) for key in bare))
        found = {key.removeprefix(prefix): tensor for key, tensor in bare.items() if key.startswith(prefix)}
    encoder = {key: tensor for key, tensor in found.items() if not key.startswith(dropped)}
    if "patch_embed.proj.weight" not in encoder:
        raise WeightsError(
            f"{where} holds no encoder of {preset}", given=f"keys such as {', '.join(list(tensors)[:3])}"
        )
    return encoder


def create(name: str, weights: str, arguments: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """Build a model through timm.

    Returns:
        The model, and the names of its tensors that the weights did not hold.
    """
    missing: list[str] = []
    file: Path | None = None if weights in ("none", "pretrained") else Path(weights)
    if name.startswith("local-dir:"):
        file = require_model_folder(Path(name.removeprefix("local-dir:")), weights) or file
    if weights == "pretrained":
        cached = in_cache_or_reachable(name)
        if cached is not None:
            # Named as a file, timm loads it without a request to the hub, which takes long without a network.
            overlay = {**arguments.get("pretrained_cfg_overlay", {}), "file": cached, "custom_load": False}
            arguments = {**arguments, "pretrained_cfg_overlay": overlay}
            file = Path(cached)
    if file is not None:
        require_fit(name, arguments, file.stat().st_size)
    try:
        with _record_missing(missing):
            model = timm.create_model(name, **arguments)
    except Exception as error:  # timm, the hub client and torch raise many kinds here
        if not arguments["pretrained"]:
            raise BackboneError(f"timm cannot build '{name}': {_first_lines(error)}") from error
        if weights != "pretrained":
            raise WeightsError(f"{weights} does not fit '{name}': {_first_lines(error)}") from error
        raise _out_of_reach(name, error) from error
    # timm would keep all the weights in the configuration of the model.
    as_timm(model).pretrained_cfg.pop("state_dict", None)
    return model, missing


def require_fit(name: str, arguments: dict[str, Any], stored: int) -> None:
    """Check that a model is not far larger than the file it is read from, before any memory is taken for it.

    Args:
        arguments: Of ``timm.create_model``.
        stored: Bytes of the file that holds its weights.

    Raises:
        BackboneError: timm cannot build it.
        WeightsError: It is far larger.
    """
    # timm copies the overlay with all that is in it, such as the weights that a preset has read.
    overlay = {key: value for key, value in arguments.get("pretrained_cfg_overlay", {}).items() if key != "state_dict"}
    with torch.device("meta"):
        model, _ = create(name, "none", {**arguments, "pretrained": False, "pretrained_cfg_overlay": overlay})
    parameters, tables = (sum(t.nbytes for t in tensors) for tensors in (model.parameters(), model.buffers()))
    if parameters > MOST_UNPACKED * stored + FREE_BYTES or tables > MOST_TABLES * stored + FREE_BYTES:
        raise WeightsError(
            f"'{name}' describes a model that its weights do not fit",
            given=f"{parameters + tables:,} bytes in memory, {tables:,} of them tables; {stored:,} bytes of weights",
            do="name the model that these weights belong to; where image_size was chosen, a smaller one",
        )


@contextmanager
def _record_missing(missing: list[str]) -> Iterator[None]:
    """Add the keys that ``load_state_dict`` misses: timm is not strict, and silent, where the classifier differs."""
    name = "load_state_dict"
    original = getattr(nn.Module, name)

    def load_state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = original(module, *args, **kwargs)
        missing.extend(found.missing_keys)
        return found

    setattr(nn.Module, name, load_state_dict)
    try:
        yield
    finally:
        setattr(nn.Module, name, original)


def in_cache_or_reachable(name: str) -> str | None:
    """Return the cached weights file of a hub model; None for others, and where the hub answers, so timm may download.

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
    return plain(" ".join(str(error).split()))[:300]


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
        repository = _repository(name, config) if config.hf_hub_id else str(config.url)
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
