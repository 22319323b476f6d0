"""Build a backbone through timm's own loader and cache, and say exactly which weights it holds."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from remap.backbones import mini  # noqa: F401 - registers the embedded pair with timm
from remap.backbones.anatomy import Anatomy, anatomy_of, classifier_parameters
from remap.backbones.names import SHORT_NAMES
from remap.backbones.preprocess import PreprocessSpec
from remap.errors import BackboneError, UnknownName, WeightsError
from remap.registry import did_you_mean


@dataclass(frozen=True)
class Identity:
    """Which backbone this is: enough to build it again and to notice that it is another one.

    Attributes:
        model: Resolved timm name or ``local-dir:`` path.
        weights: "pretrained", "none" or the path of a .safetensors file.
        sha256: Hash of all backbone tensors, the classifier left out.
    """

    model: str
    weights: str
    sha256: str


@dataclass
class Backbone:
    """A built model with all that is known of it.

    Attributes:
        head_is_fresh: Whether the classifier was newly initialised for this task.
    """

    model: nn.Module
    anatomy: Anatomy
    preprocess: PreprocessSpec
    identity: Identity
    head_is_fresh: bool

    @property
    def num_parameters(self) -> int:
        """Parameters without the classifier."""
        head = sum(p.numel() for p in classifier_parameters(self.model, self.anatomy).values())
        return sum(p.numel() for p in self.model.parameters()) - head


def resolve_name(word: str) -> str:
    """The timm name behind a short name; other words stay as they are."""
    return SHORT_NAMES.get(word, word)


def build(word: str, weights: str, num_classes: int, *, keep_head: bool = False) -> Backbone:
    """Build a backbone with a classifier for ``num_classes``.

    Args:
        word: Short name, timm name or tag, "hf-hub:..." or "local-dir:FOLDER".
        weights: "pretrained", "none" or a .safetensors file.
        keep_head: Keep the classifier that comes with the weights instead of a fresh one.

    Raises:
        UnknownName: timm has no such model.
        WeightsError: The weights cannot be had or do not fit.
        BackboneError: The family is not supported.
    """
    name = resolve_name(word)
    _require_known(word, name)
    arguments = _weight_arguments(name, weights)
    if not keep_head:
        arguments["num_classes"] = num_classes
    model = _create(name, weights, arguments)
    anatomy = anatomy_of(model)
    if keep_head:
        _require_classes(name, model, num_classes)
    else:
        fresh_head(model, anatomy, num_classes)
    digest = state_hash(model, anatomy)
    return Backbone(model, anatomy, PreprocessSpec.of(model), Identity(name, weights, digest), not keep_head)


def state_hash(model: nn.Module, anatomy: Anatomy) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers, classifier left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not anatomy.is_head(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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


def _require_known(word: str, name: str) -> None:
    if ":" in name or os.sep in name:
        if not name.startswith(("local-dir:", "hf-hub:", "hf_hub:", "timm/")):
            raise UnknownName(
                f"no such model or run directory: {word}",
                allowed="a timm name, a short name, local-dir:FOLDER, hf-hub:REPOSITORY, or a run directory",
            )
        folder = Path(name.removeprefix("local-dir:"))
        if name.startswith("local-dir:") and not (folder / "config.json").is_file():
            raise WeightsError(
                f"{folder} is no model folder of timm", given="config.json is missing", do="see timm's save_for_hf"
            )
        return
    if not timm.is_model(name):
        known = [*SHORT_NAMES, *timm.list_models("*vit*"), *timm.list_models("deit*")]
        raise UnknownName(
            f"unknown model '{word}'{did_you_mean(word.partition('.')[0], known)}",
            allowed=f"{', '.join(SHORT_NAMES)}, or a name of timm (timm.list_models('vit*'))",
            do="`remap models` lists them",
        )
    tag = name.partition(".")[2]
    tags = [full.partition(".")[2] for full in timm.list_pretrained(name.partition(".")[0] + "*")]
    if tag and tag not in tags:
        raise UnknownName(f"model '{name.partition('.')[0]}' has no weights tagged '{tag}'", allowed=tags)


def _weight_arguments(name: str, weights: str) -> dict[str, Any]:
    if weights in ("none", "pretrained"):
        return {"pretrained": weights == "pretrained"}
    path = Path(weights)
    if path.suffix != ".safetensors":
        raise WeightsError(
            "unknown source of weights", given=weights, allowed="pretrained, none, or a .safetensors file"
        )
    tensors = read_safetensors(path)
    head = tensors.get("head.weight")
    overlay: dict[str, Any] = {"file": str(path), "custom_load": False}
    if head is not None:
        overlay["num_classes"] = head.shape[0]
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": overlay.get("num_classes", 0)}


def _create(name: str, weights: str, arguments: dict[str, Any]) -> nn.Module:
    if weights == "pretrained":
        cached = _in_cache_or_reachable(name)
        if cached is not None:
            # Named as a file, timm loads it without asking the hub, which takes long where there is no network.
            arguments = {**arguments, "pretrained_cfg_overlay": {"file": cached, "custom_load": False}}
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # timm, the hub client and torch raise many kinds here
        if not arguments["pretrained"]:
            raise BackboneError(f"timm cannot build '{name}': {error}") from error
        if weights != "pretrained":
            raise WeightsError(f"{weights} does not fit '{name}': {_first_lines(error)}") from error
        raise _out_of_reach(name, error) from error


def _in_cache_or_reachable(name: str) -> str | None:
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


def _require_classes(name: str, model: nn.Module, num_classes: int) -> None:
    if model.num_classes != num_classes:
        raise BackboneError(
            f"the classifier of {name} has {model.num_classes} outputs, the data has {num_classes} classes",
            do="let teacher.prepare fit one (probe, full, or a method)",
        )


def fresh_head(model: nn.Module, anatomy: Anatomy, num_classes: int) -> None:
    """A new classifier with timm's initialisation for vision transformers: weights N(0, 0.02^2), biases zero."""
    model.reset_classifier(num_classes)
    for path in anatomy.heads_of_classifier:
        head = model.get_submodule(path)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
