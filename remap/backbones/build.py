"""Build a backbone through timm's own loader and cache, and say exactly which weights it holds."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, anatomy_of, classifier_parameters
from remap.backbones.families import FAMILIES
from remap.backbones.families.base import family_of
from remap.backbones.hub import in_cache_or_reachable
from remap.backbones.loading import create, require_fit, require_weights
from remap.backbones.lookup import require_known
from remap.backbones.model_source import named_file
from remap.backbones.names import is_pair, preset_of, resolve_name
from remap.backbones.preprocess import PreprocessSpec
from remap.backbones.projected_head import projected_head
from remap.backbones.typed import as_timm, input_channels
from remap.errors import BackboneError, WeightsError
from remap.language.names import pair_folder
from remap.language.pair import add_language

# What to do where a classifier does not serve.
PREPARE = "let teacher.prepare fit one (probe, full, or a method)"


@dataclass(frozen=True)
class Identity:
    """Which backbone this is: enough to build it again and to notice that it is another one.

    Attributes:
        model: Resolved timm name or ``local-dir:`` path.
        weights: "pretrained", "none" or the path of a file.
        sha256: Hash of all backbone tensors, the classifier left out.
        preset: How self-supervised weights are read out: "none", "mae" or "moco_v3".
        image_size: Side of the square input in pixels, where it was chosen; None for the model's own.
    """

    model: str
    weights: str
    sha256: str
    preset: str = "none"
    image_size: int | None = None


@dataclass
class Backbone:
    """A built model with all that is known of it.

    Attributes:
        head_is_fresh: Whether the classifier was newly initialised for this task.
        labels: Names of the outputs of a classifier that came with the weights; empty where nothing tells.
        notes: What a user should know of how the weights were read.
    """

    model: nn.Module
    anatomy: Anatomy
    preprocess: PreprocessSpec
    identity: Identity
    head_is_fresh: bool
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Parameters without the classifier."""
        head = sum(p.numel() for p in classifier_parameters(self.model, self.anatomy).values())
        return sum(p.numel() for p in self.model.parameters()) - head


def build(
    word: str,
    weights: str,
    num_classes: int,
    *,
    keep_head: bool = False,
    preset: str | None = None,
    image_size: int | None = None,
) -> Backbone:
    """Build a backbone with a classifier for ``num_classes``; without one for 0.

    Presets are how VPT (Jia et al. 2022) reads self-supervised plain vision transformers: "mae" takes the mean of the
    patch tokens through a fresh norm, "moco_v3" the class token. Both understand the keys of the official checkpoints.

    Args:
        word: Short name, timm name or tag, "hf-hub:...", "local-dir:FOLDER", a file of weights that says its model, or
            "clip:NAME" for the image tower of a vision-language model, with its language part beside it.
        weights: "pretrained", "none" or a file (``names.WEIGHTS_FILES``).
        keep_head: Keep the classifier that comes with the weights, whatever its number of outputs, instead of a fresh
            one.
        preset: "none", "mae" or "moco_v3"; None for what the short name implies.
        image_size: Height and width of the images in pixels; None for the model's own. timm resamples the position
            embeddings and relative position biases of weights made for another size.

    Raises:
        UnknownName: timm has no such model.
        WeightsError: The weights cannot be had or do not fit.
        BackboneError: The family is not supported, or not with this preset or size.
    """
    if is_pair(word):
        return _build_pair(word, weights, num_classes, image_size)
    preset = preset_of(word, preset)
    word, weights = named_file(word, weights)
    name = resolve_name(word)
    require_known(word, name)
    if keep_head and preset != "none":
        raise BackboneError(f"self-supervised weights ({preset}) bring no classifier", do=PREPARE)
    arguments = _sized(name, {} if keep_head else {"num_classes": num_classes}, image_size)
    loaded = create(name, weights, arguments, preset)
    model, missing = loaded.model, loaded.missing
    anatomy = anatomy_of(model)
    _require_preset_fits(name, anatomy, preset)
    # The norm behind MAE's pooling starts fresh, as in MAE's own fine-tuning.
    fresh = f"{anatomy.final_norm}." if preset == "mae" else None
    _require_all_weights(
        name, [key for key in missing if not anatomy.is_head(key) and not (fresh and key.startswith(fresh))]
    )
    if not keep_head:
        fresh_head(model, anatomy, num_classes)
        if anatomy.in_stages:  # timm may have left out the second classifier of a distilled network
            anatomy = anatomy_of(model)
    elif not as_timm(model).num_classes:
        raise BackboneError(f"the weights of {name} bring no classifier", do=PREPARE)
    digest = state_hash(model, anatomy)
    identity = Identity(name, weights, digest, preset, image_size)
    labels = loaded.labels if keep_head else ()
    return Backbone(model, anatomy, PreprocessSpec.of(model), identity, not keep_head, labels, loaded.notes)


def _build_pair(word: str, weights: str, num_classes: int, image_size: int | None) -> Backbone:
    """Build the image tower of a vision-language model, with its projection and a fresh classifier."""
    name = _pair_source(word, weights)
    loaded = create(name, weights, _sized(name, {"num_classes": 0}, image_size))
    model, anatomy = loaded.model, anatomy_of(loaded.model)
    _require_all_weights(word, [key for key in loaded.missing if not anatomy.is_head(key)])
    anatomy = add_language(model, anatomy, pair_folder(word), num_classes, random=weights == "none")
    fresh_head(model, anatomy, num_classes)
    identity = Identity(word, weights, state_hash(model, anatomy), "none", image_size)
    return Backbone(model, anatomy, PreprocessSpec.of(model), identity, head_is_fresh=True, notes=loaded.notes)


def _pair_source(word: str, weights: str) -> str:
    """Return the image tower of a vision-language model as ``create`` takes it."""
    if weights not in ("pretrained", "none"):
        raise WeightsError(f"{word} has weights of its own", given=f"weights: {weights}", do="leave weights out")
    return f"local-dir:{pair_folder(word)}"


def require_at_hand(word: str, weights: str, image_size: int | None = None) -> None:
    """Check a model's name, weights and size without building it.

    Raises:
        UnknownName: timm has no such model.
        WeightsError: The weights are neither here nor to be had.
        BackboneError: The model cannot have this size.
    """
    if is_pair(word):
        word = _pair_source(word, weights)
    word, weights = named_file(word, weights)
    name = resolve_name(word)
    require_known(word, name)
    if weights == "pretrained":
        in_cache_or_reachable(name)
    else:
        require_weights(weights)
    _sized(name, {}, image_size)


def require_stored(word: str, stored: int, *, image_size: int | None = None) -> None:
    """Check that a model, all of whose tensors are in a file of ``stored`` bytes, is about as large; nothing is built.

    Raises:
        UnknownName: timm has no such model.
        WeightsError: It is far larger than the file.
        BackboneError: The model cannot have this size.
    """
    name = f"local-dir:{pair_folder(word)}" if is_pair(word) else resolve_name(word)
    require_known(word, name)
    require_fit(name, _sized(name, {}, image_size), stored)


def state_hash(model: nn.Module, anatomy: Anatomy) -> str:
    """Return the SHA-256 over names, shapes and bytes of all parameters and buffers, classifier left out.

    Empty for a model on the meta device, which has no bytes.
    """
    if any(p.is_meta for p in model.parameters()):
        return ""
    digest = hashlib.sha256()
    add_tensors(digest, {name: tensor for name, tensor in model.state_dict().items() if not anatomy.is_head(name)})
    return digest.hexdigest()


def add_tensors(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Add names, shapes, dtypes and bytes of tensors to a hash, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _sized(name: str, arguments: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` with those that the family needs for images of this size.

    Raises:
        BackboneError: The model cannot have this size.
    """
    if image_size is None:
        return arguments
    model = require_fit(name, {}, None)
    anatomy = anatomy_of(model)
    sizes = family_of(anatomy).size_arguments(model, anatomy, image_size)
    # Where preprocessing, and networks that take any size, read it.
    overlay = {
        **arguments.get("pretrained_cfg_overlay", {}),
        "input_size": (input_channels(model), image_size, image_size),
    }
    return {**arguments, **sizes, "pretrained_cfg_overlay": overlay}


def _require_preset_fits(name: str, anatomy: Anatomy, preset: str) -> None:
    known = FAMILIES.row(anatomy.family).presets
    if preset != "none" and (preset not in known or not anatomy.has_class_token):
        raise BackboneError(
            f"the preset '{preset}' is not for {name}",
            given=f"family {anatomy.family}, {'a' if anatomy.has_class_token else 'no'} class token",
            allowed="plain vision transformers with a class token",
        )


def _require_all_weights(name: str, missing: list[str]) -> None:
    if missing:
        raise WeightsError(
            f"the weights do not hold all of '{name}': {len(missing)} tensors would stay random",
            given=f"missing {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}",
            do="name the model these weights belong to; their names must be timm's",
        )


def fresh_head(model: nn.Module, anatomy: Anatomy, num_classes: int) -> None:
    """Put in a new classifier: weights N(0, 0.02^2), timm's choice for transformers, and biases zero."""
    head = projected_head(model)
    if head is not None:
        head.reset(num_classes)
        model.num_classes = num_classes  # type: ignore[assignment]  # a plain attribute of timm's models
    else:
        as_timm(model).reset_classifier(num_classes)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and anatomy.is_head(f"{name}."):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
