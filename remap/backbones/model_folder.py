"""Write a model folder as timm does, config.json and weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.projected_head import HEAD_OF_A_PAIR, projected_head
from remap.backbones.typed import as_timm, input_channels
from remap.errors import BackboneError, RunError
from remap.io import atomic_write
from remap.io.names import plain
from remap.io.paths import path_problem

# Stands for architectures that timm itself does not know (the embedded pair): plain arguments make it any of them.
_PLAIN = "vit_tiny_patch16_224"


def save_model_folder(model: nn.Module, folder: Path, shape: Mapping[str, object], classes: Sequence[str] = ()) -> None:
    """Write ``config.json`` and ``model.safetensors`` as timm does, for ``timm.create_model("local-dir:FOLDER")``.

    The folder appears complete or not at all, and only after timm has opened it to the same function.

    Args:
        model: Made by timm and changed since; in eval, with any classifier or none.
        shape: Arguments of timm's constructor in which it differs from what timm made.
        classes: Names of the classifier's outputs.

    Raises:
        RunError: There is such a folder already, with something in it, or it cannot be written.
        BackboneError: What timm builds from the folder is another function, as always of an image tower whose
            classifier is in the space of texts.
    """
    if projected_head(model) is not None:
        raise BackboneError(
            "timm cannot build the image tower of a vision-language model, so it cannot be saved as a model folder",
            given=f"{type(model).__name__}: {HEAD_OF_A_PAIR}",
            do="use the run or its task folder, or write a file by `remap export RUN --to onnx`",
        )
    require_free(folder)
    atomic_write.make_folder(folder.parent)
    try:
        with atomic_write.new_folder(folder, last="config.json") as temporary:
            _write(model, temporary, dict(shape), list(classes))
            _require_equal(model, temporary)
    except (OSError, SafetensorError) as error:  # the second of a full disk
        reason = isinstance(error, OSError) and error.strerror
        raise RunError(
            f"cannot write {folder}: {reason or error}", do="free some space or choose another --output"
        ) from error


def open_model_folder(folder: Path) -> nn.Module:
    """Open a model folder as a user of timm does; in eval."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def opened_by_timm(word: str, arguments: Mapping[str, Any]) -> nn.Module | None:
    """Build a model as a user of timm does; None where timm or torch refuses, as for weights in a layout of others."""
    try:
        return timm.create_model(word, **arguments)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError):
        return None


def require_free(folder: Path) -> None:
    """Check that a folder can be made under this name; an empty one may be there.

    Raises:
        RunError: There is something of that name, or nothing can have it.
    """
    unfit = path_problem(folder)
    if unfit:
        raise RunError("no model folder can be made there", given=plain(f"{folder}: {unfit}"), do="name another")
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):  # whoever makes it says what is wrong with those above it
        return
    except OSError as error:
        raise RunError(f"cannot make {folder}: {error.strerror}", do="choose another --output") from error
    if not atomic_write.is_empty(folder):
        raise RunError(f"{folder} is there already", do="choose another --output, or remove it")


def _write(model: nn.Module, folder: Path, shape: dict[str, object], classes: list[str]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():  # safetensors wants every tensor in one piece
            parameter.data = parameter.data.contiguous()
    config: dict[str, object] = {"label_names": classes} if classes else {}
    if not is_known_to_timm(model):
        config["pretrained_cfg"] = {"architecture": _PLAIN}
        shape = {"patch_size": list(anatomy_of(model).patch_size), **shape}
    try:
        save_for_hf(model, str(folder), model_config=config, model_args=shape, safe_serialization=True)
        atomic_write.readable_as(folder / "config.json", folder / "model.safetensors")
    except ValueError as error:  # an argument the model was built with that JSON has no word for
        raise BackboneError(f"timm cannot describe this model in a folder: {error}") from error


def is_known_to_timm(model: nn.Module) -> bool:
    """Whether a model's architecture is timm's own; the embedded pair is not, and needs its shape as arguments."""
    return registering_module(model).startswith("timm.")


def registering_module(model: nn.Module) -> str:
    """Return the name of the Python module whose import tells timm the model's architecture."""
    architecture = str(as_timm(model).pretrained_cfg["architecture"])
    return str(timm.models.model_entrypoint(architecture).__module__)


@torch.no_grad()
def _require_equal(model: nn.Module, folder: Path) -> None:
    try:
        again = open_model_folder(folder)
    except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as error:
        raise _not_expressible(" ".join(str(error).split())[:300]) from error
    # On one device: another one may round convolutions by more than is allowed here.
    device = next(model.parameters()).device
    images_BCHW = torch.randn(
        2, input_channels(model), *anatomy_of(model).image_size, generator=torch.Generator().manual_seed(0)
    )
    ours, theirs = (_outputs(one, images_BCHW.to(device)) for one in (model.eval(), again.to(device)))
    difference = float((ours - theirs).abs().max())
    if ours.shape != theirs.shape or not difference <= 1e-5 * max(1.0, float(ours.abs().max())):
        raise _not_expressible(f"outputs differ by {difference:.1e}")


def _outputs(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return logits, or what a classifier would be given where there is none."""
    return as_timm(model).forward_head(as_timm(model).forward_features(images_BCHW)).float()


def _not_expressible(why: str) -> BackboneError:
    return BackboneError(
        "timm builds another function from this shape, so it cannot be saved as a model folder",
        given=why,
        do="ask for another shape, or take another teacher",
    )
