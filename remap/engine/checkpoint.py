"""Checkpoints: what is trained, the optimiser and the counters, of which the newest two generations are kept.

There is no generator state to keep: order, augmentation and dropout are functions of (seed, epoch, image).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remap.distributed.collectives import all_reduce_min_max, is_main_process
from remap.distributed.launch import ProcessLost
from remap.distributed.sharding import copy_full_, gather_full
from remap.engine import checkpoint_files
from remap.errors import RunError, TrainingError
from remap.io.checked_read import is_count, is_number, plain
from remap.recipe.schema import Recipe

# Bytes of tensors beyond which a file is not read: far above any real one; a stranger's must not fill the memory.
_LIMIT_FACTOR, _LIMIT_EXTRA = 16, 2**28
_ADAMW = {"step", "exp_avg", "exp_avg_sq"}


@dataclass
class State:
    """Where training stands. ``step`` counts steps done in ``epoch``; sums are over those steps.

    Attributes:
        digest: What this belongs to, see ``digest_of``.
        history: One record for each finished epoch.
        loss_sums: Sum over the steps of this epoch of each loss, as exact floats.
        seconds: Training time so far.
        counted: Steps of this epoch that ``loss_sums`` is over: all but the skipped ones.
        accumulation: Micro-batches to a step on each process, as memory allowed so far.
        lr_factor: What the learning rate is multiplied by after faults.
        recoveries: Faulty steps that are not forgotten.
        last_fault: Updates up to the last faulty step, that one included; 0 for none.
        skipped: Steps that were skipped, over the whole run.
    """

    digest: str
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss_sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    counted: int = 0
    accumulation: int = 1
    lr_factor: float = 1.0
    recoveries: int = 0
    last_fault: int = 0
    skipped: int = 0


def digest_of(recipe: Recipe, images: str, weights: str) -> str:
    """What a checkpoint belongs to: a recipe and, after pluses, digests of the images and of the models' weights."""
    return f"{recipe.digest(places=False)}+{images}+{weights}"


@torch.no_grad()
def snapshot(
    trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, memory: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a checkpoint holds besides the state: whole tensors on the CPU, by name. Every process has to call it.

    On the CPU they may be the live tensors themselves: write them before the next step.

    Args:
        trained: Parameters, and buffers that training changes.
        memory: What a method remembers from step to step (``Attached.memory``).
    """

    def plain(value: Any) -> Tensor:
        return gather_full(torch.as_tensor(value).detach()).cpu().contiguous()

    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[f"parameter/{name}"] = plain(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = plain(value)
    return tensors | {f"memory/{name}": plain(tensor) for name, tensor in (memory or {}).items()}


def save_checkpoint(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write the next generation, then drop all but the newest two. Only the main process calls it.

    Raises:
        TrainingError: A number is not finite; nothing was written.
        DiskFull: There is no room; the generations before are whole.
        RunError: The place cannot be written.
    """
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    problem = f"not finite: {', '.join(broken[:4])}" if broken else _problem(asdict(state))
    if problem:
        raise TrainingError(
            f"the state of training cannot be saved: {problem}",
            do="start again in another --output, with a lower --lr or train.precision=fp32",
        )
    checkpoint_files.write(folder, asdict(state), tensors)


def has_checkpoint(folder: Path) -> bool:
    """Whether a save was ever finished here, be it whole or damaged by now."""
    return checkpoint_files.any_finished(folder)


def load_checkpoint(
    folder: Path,
    digest: str,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
) -> tuple[State, dict[str, Tensor]]:
    """Put the newest whole generation back into the tensors of ``trained`` and the optimiser.

    Every process has to call it, with a folder that all of them see. Afterwards newer, damaged generations are gone.

    Args:
        say: Is told which generation is damaged, where one is.

    Returns:
        The state, and the method's memory as it was saved.

    Raises:
        RunError: None is whole, one cannot be read, it belongs to another recipe, or it does not fit the model.
    """
    usual = sum(tensor.numel() * tensor.element_size() for tensor in trained.values())
    reader = checkpoint_files.Reader(folder, _LIMIT_EXTRA + _LIMIT_FACTOR * usual, _problem)
    number = reader.newest()
    device = next((tensor.device for tensor in trained.values()), torch.device("cpu"))
    while True:  # all processes go on from the same one, whatever each of them can read
        low, high = all_reduce_min_max(number, device)
        if low == checkpoint_files.UNREADABLE:
            raise reader.refusal or ProcessLost(f"another process cannot read the checkpoints in {folder}")
        if low == high:
            break
        if number > low:
            reader.problems.append(f"{checkpoint_files.tensors_path(folder, number)} cannot be read by another process")
            number = reader.newest(low)
    if not number:
        raise RunError(
            f"no checkpoint in {folder} is whole",
            given="; ".join(reader.problems) or "no generation",
            do="start the run again in another --output",
        )
    state, tensors, place = State(**reader.state), reader.tensors, checkpoint_files.tensors_path(folder, number)
    if state.digest != digest:
        raise _another(place, plain(state.digest[:100]), digest)
    _require_fit(place, trained, tensors)
    for problem in reader.problems:
        say(f"{problem}; going on from {place.name}, what came after is trained again")
    for name, parameter in trained.items():
        copy_full_(parameter, tensors[f"parameter/{name}"])
        if isinstance(parameter, nn.Parameter):
            _load_optimizer_state(optimizer, name, parameter, tensors)
    if is_main_process():
        checkpoint_files.sweep(folder, number)
    kept = {key.removeprefix("memory/"): value.clone() for key, value in tensors.items() if key.startswith("memory/")}
    return state, kept


def require_planned(folder: Path, state: State, epochs: int, steps: int) -> None:
    """What a run never writes, but a stranger may: such a state would end the training before it is done, or ruin it.

    Args:
        epochs, steps: Of the whole run, and of each epoch.

    Raises:
        RunError: The state in ``folder`` is none of this run.
    """
    left = steps if state.epoch < epochs else 0
    if state.epoch > epochs or state.step > left or state.counted > state.step or not 0.0 < state.lr_factor <= 1.0:
        raise RunError(
            f"the newest checkpoint in {folder} is none of this run",
            given=f"epoch {state.epoch}, step {state.step} ({state.counted} counted), rate x {state.lr_factor:g}",
            allowed=f"up to epoch {epochs}, step {left} (as many counted), rate x 1 or less",
            do="start the run again in another --output",
        )


def _another(place: Path, theirs: str, ours: str) -> RunError:
    """Of two results of ``digest_of``: what differs, and what to do about it."""
    (recipe, _, rest), (our_recipe, _, our_rest) = theirs.partition("+"), ours.partition("+")
    (images, _, weights), (our_images, _, our_weights) = rest.rpartition("+"), our_rest.rpartition("+")
    if recipe != our_recipe:
        return RunError(
            f"{place} belongs to another recipe",
            given=f"digest {recipe!r} then, {our_recipe!r} now",
            do="resume with the recipe and the version of remap that the run was started with (its recipe.yaml and"
            " environment.json)",
        )
    if images != our_images:
        told, now = (part.partition("-") for part in (images, our_images))
        return RunError(
            f"the images are not those that the run of {place} began with: names, labels or contents differ",
            given=f"{_counted(told[2])} then, {_counted(now[2])} now; fingerprint {told[0]!r} then, {now[0]!r} now",
            do="bring them back as they were, or start the run again in another --output",
        )
    return RunError(
        f"the models are not those that the run of {place} began with: their weights differ",
        given=f"digest {weights!r} then, {our_weights!r} now",
        do="bring the weights back as they were, or start the run again in another --output",
    )


def _counted(numbers: str) -> str:
    """In words: images with a label that can be read and, after a plus, those without."""
    labeled, _, unlabeled = numbers.partition("+")
    return f"{labeled} training images" + (f" and {unlabeled} without labels" if unlabeled else "")


def _problem(state: object) -> str | None:
    """What is wrong with a state as a dictionary, when it is written and when a file from anywhere is read."""
    blank = asdict(State(""))
    if not isinstance(state, dict) or set(state) != set(blank):
        return "the fields of its state differ"
    for name, usual in blank.items():
        value = state[name]
        if isinstance(usual, float | int):
            lowest = usual if isinstance(usual, int) else 0.0  # counters only grow
            fits = is_count if isinstance(usual, int) else is_number
            if not fits(value) or value < lowest:
                return f"{name} is no {type(usual).__name__} from {lowest}"
        elif type(value) is not type(usual):
            return f"{name} is no {type(usual).__name__}"
    records = [state["loss_sums"], *state["history"]]
    if not all(isinstance(record, dict) and all(map(is_number, record.values())) for record in records):
        return "loss_sums and history hold something else than finite numbers by name"
    epochs = [record.get("epoch") for record in state["history"]]
    if len(epochs) != state["epoch"] or epochs != list(range(1, len(epochs) + 1)):
        return "history is not one record for each finished epoch"
    return None


def _require_fit(place: Path, trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    wanted = {f"parameter/{name}": (tuple(p.shape), p.dtype) for name, p in trained.items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if name.startswith("parameter/")}
    different = sorted(set(wanted.items()) ^ set(found.items()), key=str)
    fields: dict[str, set[str]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, field_name, name = (key.split("/", 2) + [""])[:3]
            fields.setdefault(name, set()).add(field_name)
            shape = () if field_name == "step" or name not in trained else tuple(trained[name].shape)
            if name not in trained or tuple(value.shape) != shape or not value.is_floating_point():
                different.append((key, (tuple(value.shape), value.dtype)))
    different += [(f"optimizer/*/{name}", (tuple(sorted(got)), None)) for name, got in fields.items() if got != _ADAMW]
    if different:
        raise RunError(
            f"{place} does not fit this model",
            given=str(different[:4])[:500],
            do="resume with the recipe, the versions and the images of the run, or start it again in another --output",
        )


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor]
) -> None:
    """Moments lie where the parameter lies, shard by shard; a step count is one number everywhere."""
    optimizer.state.pop(parameter, None)  # what is no longer good, when a run goes back
    for field_name in sorted(_ADAMW):
        value = tensors.get(f"optimizer/{field_name}/{name}")
        if value is None:  # before the first step
            continue
        if field_name != "step":
            placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copy_full_(placed, value)
        else:
            placed = value.to(parameter.device, copy=True)
        optimizer.state[parameter][field_name] = placed
