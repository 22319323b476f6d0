"""Save and load task files: tuned parameters and head, never the frozen backbone."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from remap import __version__
from remap.backbones.build import Backbone, Identity, build, fresh_head, require_stored, resolve_name, state_hash
from remap.data import CLASSES
from remap.data.views import View
from remap.distributed.sharding import copy_full_, gather_full
from remap.errors import BackboneError, RunError
from remap.io import atomic_write
from remap.io.paths import absolute, expanded
from remap.io.sealed_json import sealed_text
from remap.network import Network, choose_kernels, tuned
from remap.recipe.paths import is_run
from remap.recipe.schema import ModelSpec
from remap.runs.run_records import STUDENT_MODEL
from remap.runs.task_file import (
    FORMAT,
    FORMAT_OF_SETS,
    TaskMeta,
    folder_of,
    read_meta,
    read_tensors,
    require_finite,
    require_sizes,
)

# Tasks that were tuned on a merged task, which was tuned on another.
LONGEST_CHAIN = 16


def save_task(
    folder: Path,
    network: Network,
    view: View,
    method: str,
    options: dict[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> int:
    """Write ``task.safetensors`` and ``task.json``.

    Args:
        tensors: ``task_tensors(network)`` where the network is sharded, which needs all processes.

    Returns:
        Bytes of both files.
    """
    atomic_write.make_folder(folder)
    tensors = task_tensors(network) if tensors is None else tensors
    data = save(dict(tensors), metadata={"format": f"remap task {FORMAT}"})
    atomic_write.write_bytes(folder / "task.safetensors", data)
    body = {
        "format": FORMAT if network.task == CLASSES else FORMAT_OF_SETS,
        "remap": __version__,
        "backbone": {
            "model": network.identity.model,
            "weights": network.identity.weights,
            "preset": network.identity.preset,
            "image_size": network.identity.image_size,
            "sha256": network.identity.sha256,
        },
        "method": {"name": method, **options},
        "classes": list(network.classes or ()),
        "preprocess": network.preprocess.to_dict(),
        "view": view.to_dict(),
        **({"task": network.task} if network.task != CLASSES else {}),  # as earlier versions wrote and read it
        "holds_backbone": set(tensors) >= {name for name, _ in network.model.named_parameters()},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    atomic_write.write_text(folder / "task.json", sealed_text(body))
    return sum((folder / name).stat().st_size for name in ("task.safetensors", "task.json"))


def load_task(path: Path, *, behind: tuple[str, ...] = ()) -> tuple[Network, View]:
    """Load the tuned network of a run directory (or of its task folder); its logits are those it was saved with.

    Args:
        behind: Task folders whose backbone this one is.

    Raises:
        RunError: The files are damaged, or not what ``save_task`` writes, or the backbone is another one.
    """
    folder = folder_of(path)
    if absolute(folder) in behind or len(behind) >= LONGEST_CHAIN:
        raise RunError(f"{folder} is tuned on an endless chain of tasks", given=" <- ".join(behind[:4]))
    meta = read_meta(folder)
    tensors = read_tensors(folder, meta)
    require_sizes(folder, meta, tensors)
    weights = "none" if meta.holds_backbone else meta.backbone.weights
    source = meta.backbone.to_open(model=beside(folder, meta.backbone.model), weights=weights)
    if weights == "none":
        _require_held(folder, meta, source)
    backbone = open_backbone(source, len(meta.classes), behind=(*behind, absolute(folder)))
    network = network_of(folder, meta, tensors, backbone)
    choose_kernels(network, "auto", torch.device("cpu"))  # the kernel it was trained with, unless it is moved
    return network, meta.view


def network_of(folder: Path, meta: TaskMeta, tensors: dict[str, Tensor], backbone: Backbone) -> Network:
    """Return a task's network on its backbone, with a fresh classifier for its classes, which is changed in place.

    Raises:
        RunError: The task's files do not fit it.
    """
    spec = meta.backbone
    if not meta.holds_backbone and backbone.identity.sha256 != spec.sha256:
        raise RunError(
            f"{folder} was tuned on other weights of {spec.model}",
            given=f"backbone {backbone.identity.sha256[:16]}, task {spec.sha256[:16]}",
            do="bring back the weights the run was made with; its recipe.yaml names them",
        )
    try:
        network = tuned(backbone, meta.method.name, meta.method.options)
    except ValidationError as error:
        raise RunError(f"{folder / 'task.json'} has options that {meta.method.name} does not take") from error
    network.identity = Identity(spec.model, spec.weights, spec.sha256, spec.preset, spec.image_size)
    if meta.holds_backbone and not tensors.keys() >= dict(network.model.named_parameters()).keys():
        raise RunError(f"{folder} does not hold the backbone that its task.json says it holds")
    _put(network, tensors, folder)
    network.classes, network.preprocess, network.task = meta.classes, meta.preprocess, meta.task
    network.model.eval()  # in train mode methods answer as in a step: by the newest session alone
    return network


def _require_held(folder: Path, meta: TaskMeta, source: ModelSpec) -> None:
    """Require a backbone without a weights source to be in the task, before a model is built that it cannot fill."""
    if not meta.holds_backbone:
        raise RunError(f"{folder} neither holds its backbone nor says where the weights are")
    if _run_named(source, by_task=True) is None:  # which has weights of its own, as is said later
        stored = (folder / "task.safetensors").stat().st_size
        require_stored(source.model, stored, image_size=source.image_size)


def beside(folder: Path, model: str) -> str:
    """Return a task's backbone; a student that was cut for its run moves with the run directory."""
    place = folder.resolve().parent / STUDENT_MODEL
    return f"local-dir:{place}" if model.endswith(f"/{STUDENT_MODEL}") and place.is_dir() else model


def put_task(network: Network, path: Path) -> None:
    """Load the tuned parameters and head of a saved task into the network it was saved from, rebuilt.

    Raises:
        RunError: The files are damaged, or belong to another backbone.
    """
    folder = folder_of(path)
    meta = read_meta(folder)
    if meta.backbone.sha256 != network.identity.sha256:
        raise RunError(
            f"{folder} belongs to another backbone than {network.identity.model}",
            given=f"task {meta.backbone.sha256[:16]}, backbone {network.identity.sha256[:16]}",
            do="start the run again in another --output",
        )
    _put(network, read_tensors(folder, meta), folder)


def start_from(network: Network, path: Path, classes: tuple[str, ...], *, head: bool = True) -> int:
    """Give a network the tuned parameters of a task on the same backbone, and its rows of the classifier.

    Args:
        classes: The classes of the network, which begin with those of the task.
        head: Whether the classifiers must fit; one that is fitted anew need not.

    Returns:
        The number of classes that the task knows.

    Raises:
        RunError: The files are damaged, or the task's backbone, method or classes are others.
    """
    folder = folder_of(path)
    meta = read_meta(folder)
    tensors, known = read_tensors(folder, meta), len(meta.classes)
    if classes[:known] != meta.classes:
        raise RunError(f"the classes do not begin with those of {folder}", given=", ".join(classes[:10]))
    if meta.holds_backbone:  # no other file has these weights
        network.identity = replace(network.identity, weights="none", sha256=meta.backbone.sha256)
    elif network.identity.sha256 != meta.backbone.sha256:
        raise RunError(f"{folder} was tuned on another backbone than {network.identity.model}")
    network.attached.wants_sample = network.attached.each_session  # else what looking at images decides is in the task
    named = dict(network.model.named_parameters()) | network.tensors
    for name, tensor in tensors.items():
        rows = network.anatomy.is_head(name) and len(tensor) == known
        target = named.get(name)
        part = target[:known] if target is not None and rows else target
        if part is not None and part.shape == tensor.shape:
            with torch.no_grad():
                part.copy_(tensor)
        elif head or not network.anatomy.is_head(name):
            raise RunError(f"{name} of {folder} does not fit the student", do="keep the method of that run")
    network.attached.start_session()
    return known


def require_tuned(word: str) -> None:
    """Require a run directory to hold a student; other names pass.

    Raises:
        RunError: It holds no student; says how its run ended.
    """
    folder_of(expanded(word))


def require_classifier(network: Network, path: Path) -> None:
    """Require a tuned student to answer with classes.

    Raises:
        RunError: It was trained without labels.
    """
    if not network.classes:
        raise RunError(
            f"the student in {path} has no classifier: it was trained without labels",
            do=f"fit one: remap tune --student {shlex.quote(str(path))} --method linear --data FOLDER",
        )


def open_backbone(
    spec: ModelSpec, num_classes: int, *, keep_head: bool = False, behind: tuple[str, ...] = ()
) -> Backbone:
    """Open a backbone from any source of weights: timm, a file, or a run directory whose method can be merged.

    Args:
        behind: Task folders whose backbone it is.

    Raises:
        BackboneError: A run's method cannot be merged into plain weights, or model and weights contradict.
    """
    run = _run_named(spec, by_task=bool(behind))
    if run is not None:
        require_as_run(spec, by_task=bool(behind))
        if keep_head:
            raise BackboneError(f"the head of {run} is for other classes", do="let teacher.prepare fit one")
        backbone = _backbone_of_run(Path(absolute(run)), num_classes, behind)
        if run != spec.model and resolve_name(spec.model) != backbone.identity.model:
            raise BackboneError(
                "the weights are of another model", given=f"{spec.model}, and {run} of {backbone.identity.model}"
            )
        return backbone
    return build(
        spec.model, spec.weights, num_classes, keep_head=keep_head, preset=spec.preset, image_size=spec.image_size
    )


def _run_named(spec: ModelSpec, *, by_task: bool) -> str | None:
    """Return the run directory whose weights are named; a task names one by its absolute path only."""
    words = [word for word in (spec.model, spec.weights) if word.startswith("/") or not by_task]
    return next(filter(is_run, words), None)


def require_as_run(spec: ModelSpec, *, by_task: bool = False) -> None:
    """Require the weights of a run directory that is named, at the image size that they were tuned at.

    Args:
        by_task: Whether ``spec`` comes from a task, not from the user.

    Raises:
        BackboneError: ``spec`` asks for others.
    """
    run = _run_named(spec, by_task=by_task)
    if run is None:
        return
    if run == spec.model and spec.weights != "pretrained":
        raise BackboneError(
            f"{run} is a run directory, which already has weights",
            given=f"weights: {spec.weights}",
            do="leave weights out, or name the model that the run has tuned",
        )
    own = read_meta(folder_of(expanded(run))).preprocess.size
    if spec.image_size not in (None, own):
        raise BackboneError(
            f"{run} was tuned on images of {own} x {own} pixels",
            given=f"image_size: {spec.image_size}",
            allowed=f"{own}, or null",
            do="leave image_size out, or tune at that size and name the new run",
        )


def _backbone_of_run(path: Path, num_classes: int, behind: tuple[str, ...]) -> Backbone:
    network, _ = load_task(path, behind=behind)
    network.attached.merge()
    fresh_head(network.model, network.anatomy, num_classes)
    digest = state_hash(network.model, network.anatomy)
    identity = replace(network.identity, weights=str(path), sha256=digest)
    return Backbone(network.model, network.anatomy, network.preprocess, identity, head_is_fresh=True)


def task_tensors(network: Network) -> dict[str, Tensor]:
    """Return what a task holds, on the CPU; if the network is sharded, every process has to call it."""
    return {name: gather_full(t.detach()).cpu().contiguous() for name, t in network.in_task.items()}


def _put(network: Network, tensors: dict[str, Tensor], folder: Path) -> None:
    require_finite(network, tensors, folder)
    head = {name: tensor for name, tensor in tensors.items() if network.anatomy.is_head(name)}
    own = network.tensors
    backbone = {name: p for name, p in network.model.named_parameters() if name not in own}
    if network.identity.weights != "none":
        backbone = {}
    network.attached.load({name: t for name, t in tensors.items() if name not in head and name not in backbone})
    if {name: p.shape for name, p in backbone.items()} != {n: tensors[n].shape for n in backbone if n in tensors}:
        raise RunError(f"the backbone in {folder} does not fit {network.identity.model}")
    classifier = {name: tensor for name, tensor in own.items() if network.anatomy.is_head(name)}
    wanted = {name: tensor.shape for name, tensor in classifier.items()}
    if wanted != {name: tensor.shape for name, tensor in head.items()}:
        raise RunError(f"the classifier in {folder} does not fit the backbone")
    with torch.no_grad():
        for name, parameter in (backbone | classifier).items():
            copy_full_(parameter, tensors[name])
