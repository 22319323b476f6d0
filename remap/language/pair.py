"""A vision-language model: an image tower of timm behind a projection, and its language part beside it.

Letters: N texts, L positions, C classes, E dimensions that images and texts share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, anatomy_of, module_at
from remap.backbones.model_source import MOST_CONFIG_BYTES, weights_in
from remap.backbones.projected_head import ProjectedHead
from remap.backbones.size_bound import bounded
from remap.backbones.typed import as_timm
from remap.errors import BackboneError, WeightsError
from remap.io.checked_json import read_json
from remap.io.names import plain
from remap.io.tensor_files import first_lines, read_safetensors, stored_bytes
from remap.language.configs import TEXT_LAYOUTS, TextSide, of_open_clip, of_transformers
from remap.language.names import CONFIGS
from remap.language.text_tower import TextTower
from remap.language.tokenizer import Tokenizer, tokenizer_options

# Texts that are encoded at once.
BATCH = 256
# The projection of the image tower, as each library names it: with its own layer, as timm's classifier, transposed.
_PROJECTIONS = ("visual.head.proj", "visual.trunk.head", "visual.trunk.head.fc", "visual_projection")
_TURNED = "visual.proj"


@dataclass
class Language:
    """The language part: tower and tokenizer, which are read when they are first used; one for all copies of a model.

    Attributes:
        scale: What cosines are multiplied with, exp(logit_scale).
        bias: What is added to the logits: SigLIP's, 0 in CLIP.
        names: What the classes of this run are called, one word each, without a template; empty where a task is
            loaded: its classifier has what was made of the words.
        texts: The texts of each class: every word in every template, and descriptions.
        features_CE: What ``class_features`` gives for the texts.
        teacher: That of the vision-language teacher of the run, for a student that answers in its words.
    """

    folder: Path
    side: TextSide
    scale: float
    bias: float
    names: tuple[str, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()
    features_CE: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    teacher: "Language | None" = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Language":
        return self

    @cached_property
    def tower(self) -> TextTower:
        """The frozen text transformer, in eval mode. A method that trains it inserts a copy into the model."""
        return _read_tower(self.folder, self.side)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder, self.side)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return token ids (N, L); of a tower that sees only earlier tokens, L is that of the longest text."""
        ids_NL = self.tokenizer(texts)
        config = self.side.config
        longest = config.context
        if config.causal and config.pool == "end" and len(texts):
            longest = int(self.tower.ends(ids_NL).max()) + 1
        return ids_NL[:, :longest]

    @torch.no_grad()
    def features(
        self, texts: Sequence[str], done: Callable[[int], None] = lambda _count: None, *, unit: bool = True
    ) -> Tensor:
        """Return features (N, E), float32 on the CPU, computed in batches on the tower's device.

        Args:
            done: Called with the number of texts of each batch.
            unit: Whether they get length 1.
        """
        device, found = next(self.tower.parameters()).device, []
        for start in range(0, len(texts), BATCH):
            ids_NL = self.ids(texts[start : start + BATCH]).to(device)
            features_NE = self.tower(ids_NL).float()
            found.append((F.normalize(features_NE, dim=-1) if unit else features_NE).cpu())
            done(len(ids_NL))
        return torch.cat(found)

    def class_features(
        self, texts: Sequence[Sequence[str]], done: Callable[[int], None] = lambda _count: None
    ) -> Tensor:
        """Return features (C, E) of unit length: of each class the mean of its texts' (section 3.1.4 of CLIP)."""
        sizes = [len(one) for one in texts]
        features_NE = self.features([text for one in texts for text in one], done)
        return F.normalize(torch.stack([part.mean(dim=0) for part in features_NE.split(sizes)]), dim=-1)

    def head(self, features_CE: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (C, E) and bias (C,) of the linear layer that class features are."""
        return self.scale * features_CE, torch.full((len(features_CE),), self.bias)


def language_of(model: nn.Module) -> Language | None:
    """Return the language part of a vision-language model; None for other models."""
    return getattr(model, "language", None)


def require_language(model: nn.Module, what: str) -> Language:
    """Return the language part of a model.

    Args:
        what: That needs it, for the message.

    Raises:
        BackboneError: It has none.
    """
    language = language_of(model)
    if language is None:
        raise BackboneError(
            f"{what} needs a vision-language model", given=type(model).__name__, do="name one: --student clip:NAME"
        )
    return language


def add_language(model: nn.Module, anatomy: Anatomy, folder: Path, num_classes: int, *, random: bool) -> Anatomy:
    """Put the projection in front of the classifier of an image tower, in place, and the language part beside it.

    Args:
        random: Leave the projection random, to be filled later; its shape is read all the same.

    Returns:
        The anatomy with the classifier behind the projection.

    Raises:
        WeightsError: The folder's files cannot be read, or are of another kind of model.
    """
    if len(anatomy.classifier_heads) > 1:
        raise WeightsError(f"the image tower in {folder} has several classifiers", given=anatomy.family)
    width = int(getattr(model, "head_hidden_size", None) or as_timm(model).num_features)
    proj = _read_projection(folder, width)
    if random and isinstance(proj, nn.Linear):
        proj.reset_parameters()
    shared = proj.out_features if isinstance(proj, nn.Linear) else width
    model.set_submodule(anatomy.classifier_heads[0], ProjectedHead(proj, shared, num_classes))
    model.num_classes = num_classes  # type: ignore[assignment]  # a plain attribute of timm's models
    model.language = _read_language(folder, shared)  # type: ignore[assignment]  # no module: not in its state
    return anatomy_of(model)


@torch.no_grad()
def write_zero_shot_head(model: nn.Module, anatomy: Anatomy, features_CE: Tensor) -> None:
    """Let class features (C, E), as ``Language.class_features`` gives them, be the classifier."""
    language = require_language(model, "a classifier of words")
    classifier = module_at(model, anatomy.classifier_heads[0])
    assert isinstance(classifier, nn.Linear) and classifier.bias is not None
    weight_CE, bias_C = language.head(features_CE)
    classifier.weight.copy_(weight_CE)
    classifier.bias.copy_(bias_C)


def _read_language(folder: Path, shared: int) -> Language:
    path = next(folder / name for name in CONFIGS if (folder / name).is_file())
    try:
        config = read_json(path, MOST_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        side = of_open_clip(config) if path.name == CONFIGS[0] else of_transformers(config, tokenizer_options(folder))
    except ValueError as error:
        raise WeightsError(f"{folder} is not a vision-language model that is read: {plain(str(error))}") from error
    if (side.config.out or side.config.width) != shared:
        given = f"texts of {side.config.out or side.config.width} dimensions, images of {shared}"
        raise WeightsError(f"the towers in {folder} do not share a space", given=given)
    scalars = read_safetensors(weights_in(folder), lambda name: name in ("logit_scale", "logit_bias"))
    if "logit_scale" not in scalars or any(value.numel() != 1 for value in scalars.values()):
        raise WeightsError(f"{weights_in(folder)} has no logit_scale: it is not a vision-language model")
    scale, bias = (float(scalars[name]) if name in scalars else 0.0 for name in ("logit_scale", "logit_bias"))
    return Language(folder, side, float(torch.tensor(scale, dtype=torch.float64).exp()), bias)


def _read_projection(folder: Path, width: int) -> nn.Module:
    """Return the projection of the image tower as a linear layer; Identity where it has none."""
    names = {_TURNED, *(f"{start}.{kind}" for start in _PROJECTIONS for kind in ("weight", "bias"))}
    found = read_safetensors(weights_in(folder), names.__contains__)
    if not found:
        return nn.Identity()
    bias = next((tensor for name, tensor in found.items() if name.endswith(".bias")), None)
    weight = found.get(_TURNED, next((t for name, t in found.items() if name.endswith(".weight")), torch.empty(0)))
    if _TURNED in found and weight.ndim == 2:
        weight = weight.mT
    shapes = [tuple(tensor.shape) for tensor in (weight, bias) if tensor is not None]
    if weight.ndim != 2 or weight.shape[1] != width or shapes[1:] not in ([], [(len(weight),)]):
        given = " and ".join(map(str, shapes))
        raise WeightsError(f"the projection in {folder} does not fit its image tower", given=given)
    layer = nn.Linear(width, len(weight), bias=bias is not None)
    tensors = {"weight": weight.float().contiguous()} | ({} if bias is None else {"bias": bias.float()})
    layer.load_state_dict(tensors)
    return layer


def _read_tower(folder: Path, side: TextSide) -> TextTower:
    """Return the text tower with its weights."""
    file = weights_in(folder)
    tensors = read_safetensors(file, lambda name: not name.startswith(("visual.", "vision_model.")))
    layout = next((layout for layout in TEXT_LAYOUTS if layout.fits(tensors)), None)
    if layout is None:
        raise WeightsError(
            f"{file} holds no text tower of open_clip or transformers", given=", ".join(list(tensors)[:3])
        )
    tensors = {name: tensor.float() for name, tensor in layout.convert(tensors).items()}
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if depth != side.config.depth:  # before a great number of blocks is made
        given = f"{depth} blocks, {side.config.depth:,} in the config"
        raise WeightsError(f"the text tower in {file} does not fit its config", given=given)
    try:
        with bounded(str(folder), stored_bytes(file)):
            tower = TextTower(side.config)
        tower.load_state_dict(tensors, assign=True)
    except (RuntimeError, ValueError, AssertionError, ArithmeticError) as error:
        raise WeightsError(f"the text tower in {file} does not fit its config", given=first_lines(error)) from error
    return tower.requires_grad_(False).eval()
