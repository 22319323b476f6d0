"""Load weights: from the hub through timm's loader and cache, a file, a folder, or none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from remap.backbones.checkpoints import open_clip, torchvision_keys, transformers_keys
from remap.backbones.checkpoints.layout import Described
from remap.backbones.checkpoints.read import SOURCES, Checkpoint, read_checkpoint, some_of, stripped
from remap.backbones.checkpoints.self_supervised import encoder_of
from remap.backbones.hub import in_cache_or_reachable, out_of_reach
from remap.backbones.label_names import label_names
from remap.backbones.model_source import describe, weights_in
from remap.backbones.names import is_weights_file
from remap.backbones.size_bound import bounded
from remap.backbones.typed import as_timm
from remap.errors import BackboneError, RemapError, WeightsError
from remap.io.tensor_files import first_lines, stored_bytes

# Other libraries' layouts; at most one of them fits.
LAYOUTS = (*transformers_keys.LAYOUTS, *torchvision_keys.LAYOUTS, open_clip.LAYOUT)
# The classifier in timm's families, and in official checkpoints that timm's filters rename.
HEADS = ("head", "head.fc", "fc")


@dataclass(frozen=True)
class Loaded:
    """A built model and what its weights brought.

    Attributes:
        missing: Names of its tensors that the weights did not hold.
        labels: Names of its outputs; empty where nothing tells.
        notes: What a user should know of how the weights were read.
    """

    model: nn.Module
    missing: list[str]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def require_weights(weights: str) -> None:
    """Check that a word names a source of weights, and read it if it is a file.

    Raises:
        WeightsError: It does not, or the file cannot be read.
    """
    if weights not in ("none", "pretrained"):
        read_checkpoint(Path(weights))


def create(name: str, weights: str, arguments: Mapping[str, Any], preset: str = "none") -> Loaded:
    """Build a model through timm, with the tensors of the one file that is to be read.

    Args:
        arguments: Of ``timm.create_model``; without ``num_classes`` the classifier is the one in the weights.

    Raises:
        BackboneError: timm cannot build it.
        WeightsError: The weights cannot be had, or do not fit.
    """
    described = describe(name)
    file, is_timms = _file(name, weights), weights == "pretrained" and not name.startswith("local-dir:")
    has_own_head = "num_classes" not in arguments and weights != "none"
    arguments = _arguments(described, arguments, preset)
    labels, notes = described.labels, described.notes
    if file is not None:
        try:
            stored = stored_bytes(file)
        except OSError as error:
            raise WeightsError(f"cannot read {file}: {_why(file, error)}") from error
        reference = require_fit(name, arguments, stored)
        overlay: dict[str, Any] = {"file": str(file), "custom_load": False}
        # timm reads pickles of the hub's cache itself, weights_only: it knows how each is laid out.
        if not is_timms or file.suffix == ".safetensors":
            checkpoint = read_checkpoint(file)
            # An empty source keeps timm from preferring what it finds in a folder or on the hub.
            overlay |= {"state_dict": checkpoint.tensors, "source": ""}
            labels, notes = checkpoint.labels or labels, (*notes, *checkpoint.notes)
        if not is_timms:
            more, read = _fitted(checkpoint, reference, preset, str(file))
            overlay, notes = {**overlay, **more}, (*notes, *read)
            arguments.setdefault("num_classes", more["num_classes"])
        arguments["pretrained_cfg_overlay"] = {**arguments.get("pretrained_cfg_overlay", {}), **overlay}
    model, missing, unexpected = _built(name, weights, described, arguments)
    if preset == "none" and not is_timms:
        _require_used(name, str(file), model, unexpected)
    if not has_own_head:
        return Loaded(model, missing, notes=notes)
    names, note = label_names(as_timm(model).pretrained_cfg, labels, as_timm(model).num_classes)
    return Loaded(model, missing, names, (*notes, note) if note else notes)


def _arguments(described: Described, arguments: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Return the arguments of timm for a description, with those that were asked for in preference."""
    pooling = {"mae": "avg", "moco_v3": "token"}
    # Not strict: the final norm of MAE's weights has no place in a model that pools first. What is missing is noted.
    readout = {"global_pool": pooling[preset], "pretrained_strict": False} if preset != "none" else {}
    overlay = {**described.config, **arguments.get("pretrained_cfg_overlay", {})}
    found = {**described.arguments, **readout, **arguments}
    return {**found, "pretrained_cfg_overlay": overlay} if overlay else found


def _file(name: str, weights: str) -> Path | None:
    """Return the one file that is read; None for random weights, and for those that timm downloads."""
    if weights == "none":
        return None
    if weights != "pretrained":
        if not is_weights_file(weights):
            raise WeightsError("unknown source of weights", given=weights, allowed=SOURCES)
        return Path(weights)
    if name.startswith("local-dir:"):
        return weights_in(Path(name.removeprefix("local-dir:")))
    cached = in_cache_or_reachable(name)
    return None if cached is None else Path(cached)


def _fitted(
    checkpoint: Checkpoint, reference: nn.Module, preset: str, where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what timm's configuration needs to read a file's tensors, themselves included, and notes."""
    if preset != "none":
        tensors = encoder_of(checkpoint.tensors, preset, where)
        # Both were trained with the statistics of ImageNet, even where a tag of the architecture has others.
        overlay: dict[str, Any] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        notes: tuple[str, ...] = ()
    else:
        known = set(reference.state_dict())
        tensors, notes = stripped(checkpoint.tensors, lambda found: _is_named(found, known))
        layout = next((layout for layout in LAYOUTS if layout.fits(tensors)), None)
        overlay = {}
        if layout is not None:
            tensors, overlay = layout.convert(tensors), dict(layout.overlay)
            notes = (*notes, f"the weights are in the layout of {layout.name}")
    classes = next((len(tensors[key]) for path in _heads(reference) if (key := f"{path}.weight") in tensors), 0)
    # timm drops a classifier of another size only where its configuration names it; a folder's may not.
    own = as_timm(reference).pretrained_cfg.get("classifier")
    overlay["classifier"] = own or tuple(path for path in HEADS if f"{path}.weight" in reference.state_dict())
    return {**overlay, "state_dict": tensors, "num_classes": classes, "label_offset": 0}, notes


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Return the paths under which a file may hold the model's classifier."""
    own = as_timm(model).pretrained_cfg.get("classifier") or ()
    return (*([own] if isinstance(own, str) else own), *HEADS)


def _is_named(tensors: dict[str, Tensor], known: set[str]) -> bool:
    """Whether tensors have the names of timm's model, or of a layout that is read."""
    return 2 * len(known & tensors.keys()) >= len(known) or any(layout.fits(tensors) for layout in LAYOUTS)


def _built(
    name: str, weights: str, described: Described, arguments: dict[str, Any]
) -> tuple[nn.Module, list[str], list[str]]:
    """Return a model of timm, and the names of tensors that its weights lack and that it has no use for."""
    missing, unexpected = list[str](), list[str]()
    try:
        with _record_keys(missing, unexpected):
            model = timm.create_model(described.architecture, pretrained=weights != "none", **arguments)
    except RemapError:
        raise
    except Exception as error:  # timm, the hub client and torch raise many kinds here
        if weights == "none":
            raise BackboneError(f"timm cannot build '{name}': {first_lines(error)}") from error
        if weights != "pretrained" or name.startswith("local-dir:"):
            given = weights if weights != "pretrained" else "what its folder holds"
            raise WeightsError(f"{given} does not fit '{name}': {first_lines(error)}") from error
        raise out_of_reach(name, error) from error
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            eps = [described.eps[start] for start in described.eps if f"{path}.".startswith(start and f"{start}.")]
            module.eps = eps[-1] if eps else module.eps
    # timm would keep all the weights in the configuration of the model.
    as_timm(model).pretrained_cfg.pop("state_dict", None)
    return model, missing, unexpected


def _require_used(name: str, file: str, model: nn.Module, unexpected: list[str]) -> None:
    """Check that a file holds nothing which changes the function and which the model would leave out in silence."""
    left = [key for key in unexpected if not key.startswith(tuple(f"{path}." for path in _heads(model)))]
    if left:
        raise WeightsError(
            f"{file} holds {len(left)} tensors that '{name}' has no use for: it is the file of another model",
            given=some_of(left),
            do="name the model that these weights belong to",
        )


def require_fit(name: str, arguments: Mapping[str, Any], stored: int | None) -> nn.Module:
    """Build a model on the meta device, and check that it is not far larger than the file it is read from.

    Args:
        arguments: Of ``timm.create_model``.
        stored: Bytes of the file that holds its weights; None where there is none.

    Raises:
        BackboneError: timm cannot build it.
        WeightsError: It is far larger.
    """
    described = describe(name)
    with bounded(name, stored):
        return _built(name, "none", described, _arguments(described, arguments, "none"))[0]


def _why(file: Path, error: OSError) -> str:
    """Return why a file cannot be read; of a link, that it leads nowhere."""
    return (
        "it is a link that leads nowhere" if file.is_symlink() and not file.exists() else error.strerror or str(error)
    )


@contextmanager
def _record_keys(missing: list[str], unexpected: list[str]) -> Iterator[None]:
    """Note what ``load_state_dict`` says: timm is not strict, and silent, where the classifier differs."""
    name = "load_state_dict"
    original = getattr(nn.Module, name)

    def load_state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = original(module, *args, **kwargs)
        missing.extend(found.missing_keys)
        unexpected.extend(found.unexpected_keys)
        return found

    setattr(nn.Module, name, load_state_dict)
    try:
        yield
    finally:
        setattr(nn.Module, name, original)
