"""Checkpoints: what is trained, the optimiser's moments and the counters.

There is no generator state to store: order, augmentation and dropout are functions of (seed, epoch, image).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remap.distributed.collectives import all_reduce_min_max, is_main_process
from remap.distributed.launch import ProcessLost
from remap.distributed.sharding import copy_full_, gather_full
from remap.engine import checkpoint_files
from remap.engine.state import State, parse_state
from remap.errors import RunError, TrainingError
from remap.io.names import plain

# Bytes of tensors above which a file is not read: far above any real one; a stranger's must not fill the memory.
_LIMIT_FACTOR, _LIMIT_EXTRA = 16, 2**28


@torch.no_grad()
def snapshot(
    trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, memory: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, complete and on the CPU. Every process has to call it.

    On the CPU they may be the live tensors themselves: write them before the next step.

    Args:
        trained: Parameters, and buffers that training changes.
        memory: What a method remembers from step to step (``Attached.memory``).
    """

    def gathered(value: Any) -> Tensor:
        return gather_full(torch.as_tensor(value).detach()).cpu().contiguous()

    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[f"parameter/{name}"] = gathered(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = gathered(value)
    return tensors | {f"memory/{name}": gathered(tensor) for name, tensor in (memory or {}).items()}


def save_checkpoint(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write the next generation, then drop all but the newest two. Only the main process calls it.

    Raises:
        TrainingError: A number is not finite; nothing was written.
        DiskFull: There is no room; the earlier generations are complete.
        RunError: The folder cannot be written.
    """
    content = asdict(state)
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


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was ever completed here, even if it is damaged by now."""
    return checkpoint_files.any_finished(folder)


def load_checkpoint(
    folder: Path,
    digest: str,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
) -> tuple[State, dict[str, Tensor]]:
    """Put the newest complete generation back into the tensors of ``trained`` and the optimiser.

    Every process has to call it, with a folder that all of them see. Newer, damaged generations are deleted.

    Args:
        say: Called with a sentence for each damaged generation.

    Returns:
        The state, and the method's memory as it was saved.

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
        raise _belongs_elsewhere(path, plain(state.digest[:100]), digest)
    _require_fit(path, trained, tensors)
    # Nothing in the job has changed so far: what is refused above leaves it as it was.
    for problem in reader.problems:
        say(f"{problem}; continuing from {path.name}, what came after is trained again")
    for name, parameter in trained.items():
        copy_full_(parameter, tensors[f"parameter/{name}"])
        if isinstance(parameter, nn.Parameter):
            _load_optimizer_state(optimizer, name, parameter, tensors)
    if is_main_process():
        checkpoint_files.sweep(folder, number)
    memory = {key.removeprefix("memory/"): value.clone() for key, value in tensors.items() if key.startswith("memory/")}
    return state, memory


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


def _require_fit(path: Path, trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that a file holds the tensors of this model, and for each all of AdamW's state or (before a step) none."""
    given = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items() if not key.startswith("memory/")}
    expected = {f"parameter/{name}": (tuple(t.shape), t.dtype) for name, t in trained.items()}
    for name in [name for name in trained if f"optimizer/step/{name}" in given]:
        shape, dtype = expected[f"parameter/{name}"]
        expected |= {f"optimizer/{moment}/{name}": (shape, dtype) for moment in ("exp_avg", "exp_avg_sq")}
        expected[f"optimizer/step/{name}"] = ((), torch.float32)
    if given != expected:
        raise RunError(
            f"{path} does not fit this model",
            given=str(sorted(given.items() ^ expected.items(), key=str)[:4])[:500],
            do="resume with the recipe, the versions and the images of the run, or start it again in another --output",
        )


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor]
) -> None:
    optimizer.state.pop(parameter, None)  # a run that goes back to its beginning had no moments there
    if f"optimizer/step/{name}" not in tensors:
        return
    for moment in ("exp_avg", "exp_avg_sq"):
        value = tensors[f"optimizer/{moment}/{name}"]
        # Moments lie where the parameter lies, shard by shard.
        optimizer.state[parameter][moment] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        copy_full_(optimizer.state[parameter][moment], value)
    optimizer.state[parameter]["step"] = tensors[f"optimizer/step/{name}"].to(parameter.device, copy=True)
