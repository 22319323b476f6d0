"""What one backbone can teach, and which tuning methods fit it, found by attaching each; no weights are made."""

from dataclasses import dataclass

import torch

from remap.backbones.anatomy import Anatomy, anatomy_of
from remap.backbones.families import signals_of
from remap.backbones.loading import require_fit
from remap.backbones.lookup import require_known
from remap.backbones.model_source import named_file
from remap.backbones.names import is_pair, resolve_name
from remap.errors import BackboneError
from remap.language.names import pair_folder
from remap.tuning import METHODS
from remap.tuning.attaching import attach_method, needed


@dataclass(frozen=True)
class Support:
    """What a backbone of random weights can do.

    Attributes:
        teaches: Signals that losses can read, see ``families.signals_of``.
        tuned_by: Methods that fit with their default options.
        refused: Why the others do not, by method.
    """

    anatomy: Anatomy
    teaches: tuple[str, ...]
    tuned_by: tuple[str, ...]
    refused: dict[str, str]


def support_of(word: str) -> Support:
    """Return what a backbone can do. It is built on the meta device only.

    Raises:
        UnknownName: timm has no such model.
        WeightsError: A file or folder does not say which model it is of.
        BackboneError: It cannot be read.
    """
    word, _ = named_file(word, "pretrained")
    name = f"local-dir:{pair_folder(word)}" if is_pair(word) else resolve_name(word)
    require_known(word, name)
    model = require_fit(name, {"num_classes": 2}, None)
    anatomy = anatomy_of(model)
    refused: dict[str, str] = {}
    for row in METHODS:
        if not row.fits(anatomy.parts):
            refused[row.name] = needed(row, anatomy.parts)
            continue
        try:
            with torch.device("meta"):
                attach_method(model, anatomy, row.name, {}).detach()
        except BackboneError as error:
            refused[row.name] = error.what if error.given is None else f"{error.what} ({error.given})"
    fitting = tuple(name for name in METHODS.names if name not in refused)
    return Support(anatomy, signals_of(anatomy.parts), fitting, refused)
