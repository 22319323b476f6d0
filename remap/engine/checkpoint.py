"""Checkpoints: what is trained, the optimiser's moments and the counters.

There is no generator state to store: order, augmentation and dropout are functions of (seed, epoch, image).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from remap.distributed.collectives import all_reduce_min_max, is_main_process
from remap.distributed.launch import ProcessLost
from remap.distributed.sharding import copy_full_, gather_full
from remap.engine import checkpoint_files
from remap.engine.optim import state_after_a_step
from remap.engine.state import State, parse_state
from remap.errors import RunError, TrainingError
from remap.io.names import plain

# Bytes of tensors above which a file is not read: far above any real one; a stranger's must not fill the memory.
_LIMIT_FACTOR, _LIMIT_EXTRA = 16, 2**28


@torch.no_grad()
def snapshot(
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    memory: Mapping[str, Tensor] | None = None,
    best: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return copies of the tensors of a checkpoint by name, complete and on the CPU. Every process has to call it.

    Args:
        trained: Parameters, and buffers that training changes.
        memory: What a method remembers from step to step (``Attached.memory``).
        best: The student after its best epoch.
    """

    def gathered(value: Any) -> Tensor:
        # A copy also of what is on the CPU already: training changes it while a thread writes.
        return gather_full(stored_number(value).detach()).to("cpu", copy=True).contiguous()

    tensors: dict[str, Tensor] = {}
    # In one order on all processes: gathering a sharded tensor is a collective call.
    for name, parameter in trained.items():
        tensors[f"parameter/{name}"] = gathered(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = gathered(value)
    for kind, more in (("memory", memory), ("best", best)):
        tensors |= {f"{kind}/{name}": gathered(tensor) for name, tensor in (more or {}).items()}
    return tensors


def save_checkpoint(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write the next generation, then drop all but the newest two. Only the main process calls it.

    Raises:
        TrainingError: A number is not finite; nothing was written.
        DiskFull: There is no room; the earlier generations are complete.
        RunError: The folder cannot be written.
    """
    content = asdict(state)
    # A method's memory and ``best`` are checked here alone: ``weights_are_finite`` does not look at them.
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    try:
        if bad:
            raise ValueError(f"not finite: {', '.join(bad[:4])}")
        parse_state(content)  # what could not be read again is not written either
    except ValueError as error:
        raise TrainingError(
            f"the state of training cannot be saved: {error}",
            do="start again in another --output, with a lower --lr or train.precision=fp32",
        ) from error
    checkpoint_files.write(folder, content, tensors)


def load_checkpoint(
    folder: Path,
    digest: str,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
    student: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[State, dict[str, Tensor], dict[str, Tensor]]:
    """Put the newest complete generation back into the tensors of ``trained`` and the optimiser.

    Every process has to call it, with a folder that all of them see. Newer, damaged generations are deleted.

    Args:
        say: Called with a sentence for each damaged generation.
        student: What the file may hold a copy of, as it was after the best epoch.

    Returns:
        The state, the method's memory as it was saved, and the student after its best epoch, complete.

    Raises:
        RunError: None is complete, one cannot be read, it belongs to another recipe, or it does not fit the model.
    """
    # The optimiser's moments are twice the parameters, a method's memory may be more.
    usual = sum(tensor.numel() * tensor.element_size() for tensor in trained.values())
    reader = checkpoint_files.Reader(folder, _LIMIT_EXTRA + _LIMIT_FACTOR * usual, parse_state)
    number = reader.newest()
    device = next((tensor.device for tensor in trained.values()), torch.device("cpu"))
    # All processes have to continue from the same generation, so from the newest that each of them can read.
    while True:
        low, high = all_reduce_min_max(number, device)
        # Below every number: the minimum tells all processes that one of them cannot read.
        if low == checkpoint_files.UNREADABLE:
            raise reader.refusal or ProcessLost(f"another process cannot read the checkpoints in {folder}")
        if low == high:
            break
        if number > low:
            reader.problems.append(f"{checkpoint_files.path_of(folder, number)} cannot be read by another process")
            number = reader.newest(low)
    if reader.loaded is None:
        raise RunError(
            f"no checkpoint in {folder} is complete",
            given="; ".join(reader.problems) or "no generation",
            do="start the run again in another --output",
        )
    (state, tensors), path = reader.loaded, checkpoint_files.path_of(folder, number)
    if state.digest != digest:
        # The file may be anybody's: what it says is cut, and made printable, before a message shows it.
        raise _belongs_elsewhere(path, plain(state.digest[:100]), digest)
    layout = state_after_a_step(optimizer)
    _require_fit(path, trained, student, tensors, layout)
    # Nothing in the job has changed so far: what is refused above leaves it as it was.
    for problem in reader.problems:
        say(f"{problem}; continuing from {path.name}, what came after is trained again")
    for name, parameter in trained.items():
        copy_full_(parameter, tensors[f"parameter/{name}"])
        if isinstance(parameter, nn.Parameter):  # buffers have no moments
            _load_optimizer_state(optimizer, name, parameter, tensors, layout.get(id(parameter), {}))
    if is_main_process():
        # Damaged ones have manifests too: left there, they would count as the newest two when the next is written.
        checkpoint_files.sweep(folder, number)
    memory, best = (
        {key.removeprefix(kind): value.clone() for key, value in tensors.items() if key.startswith(kind)}
        for kind in ("memory/", "best/")
    )
    return state, memory, best


def _belongs_elsewhere(path: Path, theirs: str, ours: str) -> RunError:
    """Return the error for two different results of ``digest_of``: what differs, and what to do about it."""
    (recipe, images, weights), (our_recipe, our_images, our_weights) = _parts(theirs), _parts(ours)
    if recipe != our_recipe:
        what, then, now = f"{path} belongs to another recipe", f"digest {recipe!r}", repr(our_recipe)
        do = "resume with the recipe and version of remap that the run was started with (recipe.yaml, environment.json)"
    elif images != our_images:
        what = f"the images are not those that the run of {path} began with: names, labels or contents differ"
        then, now = _images(images), _images(our_images)
        do = "restore the images, or start the run again in another --output"
    else:
        what = f"the models are not those that the run of {path} began with: their weights differ"
        then, now = f"digest {weights!r}", repr(our_weights)
        do = "restore the weights, or start the run again in another --output"
    return RunError(what, given=f"{then} then, {now} now", do=do)


def _parts(digest: str) -> tuple[str, str, str]:
    recipe, _, rest = digest.partition("+")
    images, _, weights = rest.rpartition("+")  # which may hold a plus
    return recipe, images, weights


def _images(digest: str) -> str:
    """Put the digest of images into words: a fingerprint, and how many have a label and, after a plus, have none."""
    fingerprint, _, counts = digest.partition("-")
    labeled, _, unlabeled = counts.partition("+")
    more = f" and {unlabeled} without labels" if unlabeled else ""
    return f"{labeled} training images{more}, fingerprint {fingerprint!r},"


def _require_fit(
    path: Path,
    trained: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    layout: Mapping[int, Mapping[str, Any]],
) -> None:
    """Check that a file holds the tensors of this model, each with the optimiser's state or (before a step) without.

    Args:
        layout: ``state_after_a_step``.
    """
    # The shapes of a method's memory are known to the method alone: ``recall`` checks them.
    given = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items() if not key.startswith("memory/")}
    expected = {f"parameter/{name}": (tuple(t.shape), t.dtype) for name, t in trained.items()}
    stepped = {key.split("/", 2)[-1] for key in given if key.startswith("optimizer/")}
    for name in stepped.intersection(trained):
        stored = {key: stored_number(value) for key, value in layout.get(id(trained[name]), {}).items()}
        expected |= {f"optimizer/{key}/{name}": (tuple(t.shape), t.dtype) for key, t in stored.items()}
    # Whether it has to be there follows from the history, which ``Training.load`` looks at.
    if any(key.startswith("best/") for key in given):
        expected |= {f"best/{name}": (tuple(t.shape), t.dtype) for name, t in student.items()}
    if given != expected:
        raise RunError(
            f"{path} does not fit this model",
            given=str(sorted(given.items() ^ expected.items(), key=str)[:4])[:500],
            do="resume with the recipe, the versions and the images of the run, or start it again in another --output",
        )


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    name: str,
    parameter: nn.Parameter,
    tensors: Mapping[str, Tensor],
    layout: Mapping[str, Any],
) -> None:
    optimizer.state.pop(parameter, None)  # a run that goes back to its beginning had no moments there
    for key, like in layout.items():
        value = tensors.get(f"optimizer/{key}/{name}")
        if value is None:
            return
        if not isinstance(like, Tensor):
            optimizer.state[parameter][key] = value.item()
        elif key != "step" and value.shape == parameter.shape:
            # Moments lie where the parameter lies, shard by shard.
            optimizer.state[parameter][key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copy_full_(optimizer.state[parameter][key], value)
        else:
            # torch counts steps on the CPU, except in fused optimisers.
            on_cpu = key == "step" and not optimizer.defaults.get("fused")
            optimizer.state[parameter][key] = value.to("cpu" if on_cpu else parameter.device, copy=True)


def stored_number(value: Any) -> Tensor:
    """Return a number or tensor of an optimiser as a tensor; a Python number keeps all its bits."""
    return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
