"""One batch pushed through everything a run is made of: what an image costs in time and memory."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from remap.data import keyed_random
from remap.distributed.launch import accelerator
from remap.engine.job import StudentStep
from remap.engine.teacher import Teacher
from remap.pipeline.assemble import RunComponents, feature_bytes
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective
from remap.remapping.signals import Signals

# Images of the first trial batch. A second one is as much larger, up to the run's own, as about this many seconds
# allow: fixed costs of a step weigh less in a larger one.
TRIAL_IMAGES, TRIAL_SECONDS = 8, 4.0


@dataclass(frozen=True)
class TermCost:
    """What one image costs in one term: seconds of forward and backward, bytes kept between, bytes of its items."""

    seconds: float
    memory_bytes: float
    item_bytes: int


@dataclass(frozen=True)
class StepProfile:
    """What one image costs: seconds of each teacher, of the student's step, of its forward pass alone and of its frozen
    part where that is kept, bytes kept for the backward pass; and the bytes of the frozen features of all images."""

    teacher_seconds: dict[int, float]
    student_seconds: float
    forward_seconds: float
    stem_seconds: float
    features_bytes: int
    activation_bytes: int
    losses: dict[str, float]
    terms: dict[str, TermCost]


class _Saved:
    """Bytes that autograd keeps for the backward pass, parameters left out, each storage once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def __call__(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            self._sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def profile_step(parts: RunComponents, teachers: dict[int, Teacher]) -> StepProfile:
    """Push a small batch, and a larger one where time allows.

    Args:
        teachers: Those that the objective listens to, by number, without kept outputs.
    """
    spec, images = parts.recipe.train, len(parts.lessons.split)
    most = min(images, max(1, spec.batch_size // (spec.accumulation * accelerator().num_processes)))
    count = min(TRIAL_IMAGES, most)
    trial = _measured(parts, teachers, count)
    # A batch goes twice through teachers and student.
    each = 2 * (sum(trial.teacher_seconds.values()) + trial.stem_seconds + trial.student_seconds)
    larger = min(most, int(TRIAL_SECONDS / each))
    if larger < 2 * count:
        return trial
    try:
        return _measured(parts, teachers, larger)
    except torch.OutOfMemoryError:  # of a GPU
        return trial


def _measured(parts: RunComponents, teachers: dict[int, Teacher], count: int) -> StepProfile:
    device, recipe = accelerator().device, parts.recipe
    source = parts.lessons
    indices = keyed_random.permutation(recipe.seed, 0, len(source.split))[:count]
    images, good = source.batch(indices)
    images, classes = images.to(device), torch.from_numpy(source.split.labels[good]).to(device)
    labels = Labels(classes, labeled=parts.labeled_share)
    step = StudentStep(parts.student, parts.objective, bf16=parts.bf16).to(device)
    features = _features(parts)
    parts.student.attached.train()
    targets: list[dict[str, Tensor]] = [{} for _ in parts.teachers] or [{}]
    teacher_seconds = dict.fromkeys(teachers, 0.0)
    for _ in range(2):  # the first warms up
        for number, teacher in teachers.items():
            _wait(device)
            started = time.perf_counter()
            targets[number] = teacher.items(images)
            _wait(device)
            teacher_seconds[number] = (time.perf_counter() - started) / len(good)
        saved = _Saved()
        asked = time.perf_counter()
        kept = step.runner.stem(images) if features else None
        _wait(device)
        begun = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(saved, _same):
            total, parts_of_loss = step(images, targets, labels, kept)
        total.backward()
        losses = {name: value.item() for name, value in {"total": total, **parts_of_loss}.items()}
        done = time.perf_counter()
    with torch.no_grad():
        _wait(device)
        forward_from = time.perf_counter()
        signals = step.runner(images, kept)
        _wait(device)
        forward = time.perf_counter() - forward_from
    terms = _term_costs(parts.objective, signals, targets, labels)
    step.runner.tap.close()
    for parameter in (*parts.student.trained.values(), *parts.objective.parameters()):
        parameter.grad = None
    return StepProfile(
        teacher_seconds,
        (done - begun) / len(good),
        forward / len(good),
        (begun - asked) / len(good),
        features,
        saved.nbytes // len(good),
        losses,
        terms,
    )


def _term_costs(
    objective: Objective, signals: Signals, targets: list[dict[str, Tensor]], labels: Labels
) -> dict[str, TermCost]:
    """Each term run by itself on the signals of one forward pass."""
    found, count, device = {}, len(labels.classes_B), labels.classes_B.device
    for name, term in objective.terms.items():
        items = targets[objective.teacher_of[name]] if term.uses_teacher else {}
        for _ in range(2):  # the first warms up
            leaves, saved, reading = signals.leaves(), _Saved(), _Reading(items)
            _wait(device)
            started = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(saved, _same):
                value = term(leaves, reading, labels)
            value.backward()
            _wait(device)
            seconds = time.perf_counter() - started
        size = sum(items[key][0].numel() * items[key].element_size() for key in reading.read)
        found[name] = TermCost(seconds / count, saved.nbytes / count, size)
    return found


class _Reading(dict):
    """Items that remember which of them were read."""

    def __init__(self, items: dict[str, Tensor]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


def _features(parts: RunComponents) -> int:
    """Bytes of the student's frozen features, 0 where they are not kept."""
    needed = feature_bytes(parts) or 0
    return needed if needed <= parts.recipe.data.memory_gib * 2**30 else 0


def _wait(device: torch.device) -> None:
    """Work on a GPU runs behind the program; a clock must wait for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _same(tensor: Tensor) -> Tensor:
    return tensor
