"""Profile one training step: time and memory per image."""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from remap.data import keyed_random
from remap.data.views import listed
from remap.distributed.launch import accelerator
from remap.engine.block_checkpoints import checkpointed_blocks
from remap.engine.job import StudentStep
from remap.engine.teacher import Teacher
from remap.engine.timing import Timer
from remap.errors import DataError
from remap.pipeline.components import RunComponents
from remap.pipeline.student_features import feature_bytes
from remap.progress import Progress
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective
from remap.remapping.signals import Signals

# A first batch of this many images tells how large a second one, up to the run's, takes about this many seconds: the
# fixed costs of a step weigh less in a larger batch.
FIRST_IMAGES, SECOND_SECONDS = 2, 4.0
# Seconds of a pass from which on what the first pass of all takes longer than later ones does not count.
LONG_S = 2.0


@dataclass(frozen=True)
class TermCost:
    """What one image costs in one term: seconds of both passes, bytes saved between them, bytes of its items."""

    seconds: float
    memory_bytes: float
    item_bytes: int


@dataclass(frozen=True)
class StepProfile:
    """What one image costs.

    Attributes:
        teacher_seconds: Of each teacher's forward pass, by its number.
        student_seconds: Of the student's forward and backward pass and the losses.
        forward_seconds: Of the student's forward pass in evaluation.
        stem_seconds: Of the student's frozen part, where its features are cached; else 0.
        features_bytes: Of the cached frozen features of all images; 0 where they are not cached.
        activation_bytes: Saved for the backward pass.
        reading_seconds: Of reading and decoding.
    """

    teacher_seconds: dict[int, float]
    student_seconds: float
    forward_seconds: float
    stem_seconds: float
    features_bytes: int
    activation_bytes: int
    losses: dict[str, float]
    terms: dict[str, TermCost]
    reading_seconds: float


class _Saved:
    """Counts the bytes that autograd saves for the backward pass: without parameters, each storage once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    def __call__(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            self._sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def profile_step(components: RunComponents, teachers: dict[int, Teacher], progress: Progress) -> StepProfile:
    """Profile a small batch, and a larger one where it takes seconds only.

    Args:
        teachers: Those that the objective reads, by number, without cached outputs.
    """
    spec, images = components.recipe.train, len(components.training_source.split)
    most = min(images, max(1, spec.batch_size // (spec.accumulation * accelerator().num_processes)))
    count = min(FIRST_IMAGES, most)
    with checkpointed_blocks(components.student) if spec.checkpoint_blocks else nullcontext():
        return _of_sizes(components, teachers, count, most, progress)


def _of_sizes(
    components: RunComponents, teachers: dict[int, Teacher], count: int, most: int, progress: Progress
) -> StepProfile:
    with progress.wait(f"timing a step of {count} images"):
        profile = _measure(components, teachers, count)
    # Each batch runs twice: once to warm up.
    each = 2 * (sum(profile.teacher_seconds.values()) + profile.stem_seconds + profile.student_seconds)
    larger = min(most, int(SECOND_SECONDS / max(each, 1e-9)))  # which a coarse clock does not see
    # A batch that is hardly larger would tell nothing new.
    if larger < 2 * count:
        return profile
    try:
        with progress.wait(f"timing a step of {larger} images"):
            return _measure(components, teachers, larger)
    except torch.OutOfMemoryError:  # of a GPU
        return profile


def _measure(components: RunComponents, teachers: dict[int, Teacher], count: int) -> StepProfile:
    device, recipe = accelerator().device, components.recipe
    source = components.training_source
    # The first images of the first epoch, so that unusual ones count as they will in training.
    order = keyed_random.permutation(recipe.seed, 0, len(source.split))
    started = time.perf_counter()
    for start in range(0, len(order), count):  # the next ones where none can be read
        images, good = source.batch(order[start : start + count])
        if len(good):
            break
    else:
        raise DataError("none of the training images can be read", given=listed(source.bad_names()))
    reading = (time.perf_counter() - started) / min(start + count, len(order))
    images, classes = images.to(device), torch.from_numpy(source.split.labels[good]).to(device)
    labels = Labels(classes, labeled=components.labeled_share)
    step = StudentStep(components.student, components.objective, bf16=components.bf16).to(device)
    features = _features(components)
    # Dropout and batch statistics as in training.
    components.student.attached.train()
    targets: list[dict[str, Tensor]] = [{} for _ in components.teachers] or [{}]
    teacher_seconds = dict.fromkeys(teachers, 0.0)
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        for number, teacher in teachers.items():
            with Timer(device) as teacher_timer:
                targets[number] = teacher.items(images)
            teacher_seconds[number] = teacher_timer.seconds / len(good)
        saved = _Saved()
        with Timer(device) as stem_timer:
            stem = step.runner.stem(images) if features else None
        with Timer(device) as step_timer:
            with torch.autograd.graph.saved_tensors_hooks(saved, _same):
                total, loss_values = step(images, targets, labels, stem)
            total.backward()
        losses = {name: value.item() for name, value in {"total": total, **loss_values}.items()}
        if time.perf_counter() - began > LONG_S:
            break
    with torch.no_grad(), Timer(device) as forward_timer:
        signals = step.runner(images, stem)
    terms = _term_costs(components.objective, signals, targets, labels)
    step.runner.tap.close()
    for parameter in (*components.student.trained.values(), *components.objective.parameters()):
        # The networks may be trained afterwards.
        parameter.grad = None
    return StepProfile(
        teacher_seconds,
        step_timer.seconds / len(good),
        forward_timer.seconds / len(good),
        stem_timer.seconds / len(good),
        features,
        saved.nbytes // len(good),
        losses,
        terms,
        reading,
    )


def _term_costs(
    objective: Objective, signals: Signals, targets: list[dict[str, Tensor]], labels: Labels
) -> dict[str, TermCost]:
    """Run each term by itself on the signals of one forward pass."""
    costs, count, device = {}, len(labels.classes_B), labels.classes_B.device
    for name, term in objective.terms.items():
        items = targets[objective.teacher_of[name]] if term.uses_teacher else {}
        for _ in range(2):  # the first warms up
            # Leaves: the backward pass ends at the signals, and costs of terms do not mix.
            leaves, saved, reading = signals.leaves(), _Saved(), _Reading(items)
            with Timer(device) as timer:
                with torch.autograd.graph.saved_tensors_hooks(saved, _same):
                    value = term(leaves, reading, labels)
                value.backward()
        size = sum(items[key][0].numel() * items[key].element_size() for key in reading.read)
        costs[name] = TermCost(timer.seconds / count, saved.nbytes / count, size)
    return costs


class _Reading(dict):
    """Items that record which of them were read."""

    def __init__(self, items: dict[str, Tensor]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


def _features(components: RunComponents) -> int:
    """Return the bytes of the student's frozen features, 0 where they are not cached."""
    needed = feature_bytes(components) or 0
    return needed if needed <= components.recipe.data.memory_gib * 2**30 else 0


def _same(tensor: Tensor) -> Tensor:
    return tensor
