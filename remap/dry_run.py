"""Build everything, push one batch, and say what the run would cost; nothing is trained or written."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from remap.assembly import Parts, assemble, feature_bytes
from remap.bench import Bench
from remap.data import keyed
from remap.data.batches import closed_views
from remap.engine.fit import StudentStep
from remap.engine.launch import accelerator, check_processes
from remap.engine.teacher import Teacher
from remap.network import Network
from remap.outputs import Place, listening_teacher, place_of_outputs
from remap.progress import Progress
from remap.recipe.schema import EMA, Recipe
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Objective
from remap.remapping.signals import Signals
from remap.runs.objective import without_idle_losses
from remap.teachers import PreparedTeacher, needs_logits, teacher_recipe

# Images of the first trial batch. A second one is as much larger, up to the run's own, as about this many seconds
# allow: fixed costs of a step weigh less in a larger one.
TRIAL_IMAGES, TRIAL_SECONDS = 8, 4.0


@dataclass(frozen=True)
class Estimate:
    """What a run would cost on this machine.

    Attributes:
        cache_bytes, disk_cache_bytes: Kept outputs of the teachers, in memory and on disk.
        features_bytes: Kept frozen features of the student.
        memory_bytes: Weights, gradients, optimiser state and activations of one process at the full batch; where that
            is a GPU's memory, without what is kept in that of the machine (images, outputs, features).
        disk_bytes: Task files and checkpoint; a prepared teacher's head is counted too.
        seconds: All of it: building the networks and reading the images, preparing the teacher, training, evaluation.
        preparing_seconds: Of it, giving the teacher its head.
    """

    step_seconds: float
    steps: int
    seconds: float
    preparing_seconds: float
    memory_bytes: int
    activation_bytes: int
    cache_bytes: int
    disk_cache_bytes: int
    features_bytes: int
    task_bytes: int
    disk_bytes: int


def estimate(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Resolve, build, push one batch, estimate.

    Returns:
        ``recipe``, ``data``, ``teacher`` (the first), ``teachers``, ``student``, ``trainable`` (rows of part, tensors,
        parameters), ``losses``, ``terms`` (what each loss costs, and which block teaches which) and ``estimate``;
        plain values, ready for JSON.
    """
    check_processes(recipe.train.processes)
    recipe = without_idle_losses(recipe, progress).written_out()
    bench = Bench()
    started = time.perf_counter()
    parts = assemble(recipe, None, progress, bench)
    building = time.perf_counter() - started
    device = accelerator().device
    parts.objective.to(device)
    numbers = [number for number in range(len(parts.teachers)) if parts.objective.listens_to(number)]
    teachers = {number: listening_teacher(parts, number) for number in numbers}
    places = {number: place_of_outputs(parts, parts.teachers[number], teacher) for number, teacher in teachers.items()}
    trial = _trial(parts, teachers)
    preparing = sum(
        _preparing_seconds(parts, teacher, trial.teacher_seconds.get(number, 0.0), progress, bench)
        for number, teacher in enumerate(parts.teachers)
    )
    found = _estimate(parts, places, trial, preparing, building)
    described = [_teacher(teacher, places.get(number)) for number, teacher in enumerate(parts.teachers)]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": {
            "source": parts.views.data.source,
            "classes": len(parts.views.data.classes),
            "train_images": len(parts.lessons.split),
            "labeled_images": round(len(parts.lessons.split) * parts.labeled_share),
            "val_images": len(parts.views.val.split),
            "skipped": [list(item) for item in parts.views.skipped],
        },
        "teacher": described[0] if described else None,
        "teachers": described,
        "student": _model(parts.student),
        "trainable": trainable_rows(parts),
        "learning_rate": recipe.learning_rate(parts.student.anatomy.width),
        "losses": trial.losses,
        "terms": _terms(parts, trial, places),
        "device": str(device),
        "precision": "bf16" if parts.bf16 else "fp32",
        "estimate": asdict(found),
    }


def _teacher(teacher: PreparedTeacher, place: Place | None) -> dict[str, Any]:
    where = {"outputs": place.where, "outputs_bytes": place.bytes} if place else {"outputs": "not read"}
    return {**_model(teacher.network), "source": teacher.spec.model, "weight": teacher.spec.weight, **where}


def _terms(parts: Parts, trial: "_Trial", places: dict[int, Place]) -> list[dict[str, Any]]:
    """What each term costs by itself: seconds and bytes of one step, bytes of kept teacher outputs for all images."""
    rows, size = [], parts.recipe.train.batch_size // parts.recipe.train.accumulation
    views = len(parts.lessons.split) * closed_views(parts.recipe.data)
    for name, term in parts.objective.terms.items():
        cost = trial.terms[name]
        place = places.get(parts.objective.teacher_of[name]) if term.uses_teacher else None
        kept = place is not None and place.where != "each step"
        rows.append(
            {
                "name": name,
                "weight": parts.objective.weights[name],
                "seconds": cost.seconds * size,
                "memory_bytes": cost.memory_bytes * size,
                "cache_bytes": cost.item_bytes * views if kept else 0,
                "blocks": [list(pair) for pair in term.blocks],
            }
        )
    return rows


def _model(network: Network) -> dict[str, Any]:
    head = sum(p.numel() for p in network.head.values())
    added = sum(
        p.numel() for name, p in network.model.named_parameters() if name.startswith(network.attached.added_prefixes)
    )
    return {
        "model": network.identity.model,
        "weights": network.identity.weights,
        "input_size": network.preprocess.size,
        "backbone_parameters": network.num_parameters - head - added,
        "head_parameters": head,
        "added_parameters": added,
    }


def trainable_rows(parts: Parts) -> list[dict[str, Any]]:
    """One row a part that is trained: method, head and, for each loss, its projectors."""
    groups: dict[str, list[Tensor]] = {parts.recipe.method.name: [], "head": []}
    for name, parameter in parts.student.trained.items():
        groups["head" if parts.student.anatomy.is_head(name) else parts.recipe.method.name].append(parameter)
    for name, term in parts.objective.terms.items():
        projectors = [p for p in term.parameters() if p.requires_grad]
        if projectors:
            groups[f"projector of {name} (not kept)"] = projectors
    return [
        {
            "part": part,
            "tensors": len(tensors),
            "shapes": sorted({"x".join(map(str, tensor.shape)) for tensor in tensors})[:4],
            "parameters": sum(tensor.numel() for tensor in tensors),
        }
        for part, tensors in groups.items()
    ]


@dataclass(frozen=True)
class _TermCost:
    """What one image costs in one term: seconds of forward and backward, bytes kept between, bytes of its items."""

    seconds: float
    memory_bytes: float
    item_bytes: int


@dataclass(frozen=True)
class _Trial:
    """What one image costs: seconds of each teacher, of the student's step, of its forward pass alone and of its frozen
    part where that is kept, bytes kept for the backward pass; and the bytes of the frozen features of all images."""

    teacher_seconds: dict[int, float]
    student_seconds: float
    forward_seconds: float
    stem_seconds: float
    features_bytes: int
    activation_bytes: int
    losses: dict[str, float]
    terms: dict[str, _TermCost]


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


def _trial(parts: Parts, teachers: dict[int, Teacher]) -> _Trial:
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


def _measured(parts: Parts, teachers: dict[int, Teacher], count: int) -> _Trial:
    device, recipe = accelerator().device, parts.recipe
    source = parts.lessons
    indices = keyed.permutation(recipe.seed, 0, len(source.split))[:count]
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
    return _Trial(
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
) -> dict[str, _TermCost]:
    """Each term run by itself on the signals of one forward pass."""
    found, count, device = {}, len(labels.classes_B), labels.classes_B.device
    for name, term in objective.terms.items():
        items = targets[objective.teacher_of[name]] if term.uses_teacher else {}
        for _ in range(2):  # the first warms up
            leaves, saved = signals.leaves(), _Saved()
            _wait(device)
            started = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(saved, _same):
                value = term(leaves, items, labels)
            value.backward()
            _wait(device)
            seconds = time.perf_counter() - started
        used = _items_read(term, leaves, items, labels)
        size = sum(items[key][0].numel() * items[key].element_size() for key in used)
        found[name] = _TermCost(seconds / count, saved.nbytes / count, size)
    return found


class _Reading(dict):
    """Items that remember which of them were read."""

    def __init__(self, items: dict[str, Tensor]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


@torch.no_grad()
def _items_read(term: LossTerm, signals: Signals, items: dict[str, Tensor], labels: Labels) -> set[str]:
    reading = _Reading(items)
    term(signals, reading, labels)
    return reading.read


def _features(parts: Parts) -> int:
    """Bytes of the student's frozen features, 0 where they are not kept."""
    needed = feature_bytes(parts) or 0
    return needed if needed <= parts.recipe.data.memory_gib * 2**30 else 0


def _wait(device: torch.device) -> None:
    """Work on a GPU runs behind the program; a clock must wait for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _preparing_seconds(parts: Parts, teacher: PreparedTeacher, each: float, progress: Progress, bench: Bench) -> float:
    """What giving a teacher a head takes: a forward pass over the labelled images for a probe, else a run of its own
    (``teacher_recipe``), which is estimated like any other.

    Args:
        each: Seconds of the teacher's forward pass for one image.
    """
    recipe, spec = parts.recipe, teacher.spec
    if not needs_logits(recipe) or teacher.head != "none":
        return 0.0
    if spec.prepare == "probe":
        return each * len(parts.views.train.split) / accelerator().num_processes
    tuning = assemble(teacher_recipe(recipe, spec).written_out(), None, progress, bench)
    tuning.objective.to(accelerator().device)
    return _estimate(tuning, {}, _trial(tuning, {}), 0.0, 0.0).seconds


def _estimate(parts: Parts, places: dict[int, Place], trial: _Trial, preparing: float, building: float) -> Estimate:
    recipe, lessons, val = parts.recipe, parts.lessons, parts.views.val
    spec, processes = recipe.train, accelerator().num_processes
    micro = max(1, spec.batch_size // (spec.accumulation * processes))
    trained = [*parts.student.trained.values(), *(p for p in parts.objective.parameters() if p.requires_grad)]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weights = _weight_bytes([parts.student, *(teacher.network for teacher in parts.teachers)])
    kept = {number for number, place in places.items() if place.where != "each step"}
    steps = max(1, len(lessons.split) // spec.batch_size) * spec.epochs
    asked = sum(seconds for number, seconds in trial.teacher_seconds.items() if number not in kept)
    step_seconds = (trial.student_seconds + asked) * spec.batch_size / processes
    once = sum(trial.teacher_seconds[number] for number in kept) * len(lessons.split) * closed_views(recipe.data)
    once += trial.stem_seconds * (len(lessons.split) + len(val.split))
    passes = 1 + -(-spec.epochs // spec.eval_every)  # before the first epoch, and always behind the last
    test = parts.views.test
    evaluated = passes * len(val.split) + (0 if test is None else len(test.split))
    checks = trial.forward_seconds * evaluated / processes
    if needs_logits(recipe):  # the teachers are evaluated once
        checks += sum(trial.teacher_seconds.values()) * len(val.split) / processes
    task = sum(p.numel() * p.element_size() for p in parts.student.trained.values()) + 4096
    in_memory = sum(place.bytes for place in places.values() if place.where == "memory")
    on_disk = sum(place.bytes for place in places.values() if place.where == "disk")
    return Estimate(
        step_seconds=step_seconds,
        steps=steps,
        seconds=building + preparing + step_seconds * steps + once + checks,
        preparing_seconds=preparing,
        memory_bytes=weights
        + 3 * trained_bytes
        + trial.activation_bytes * micro
        + (in_memory + trial.features_bytes + lessons.kept_bytes if accelerator().device.type == "cpu" else 0),
        activation_bytes=trial.activation_bytes * micro,
        cache_bytes=in_memory,
        disk_cache_bytes=on_disk,
        features_bytes=trial.features_bytes,
        task_bytes=task,
        disk_bytes=task + 3 * trained_bytes + on_disk + sum(_prepared_bytes(teacher) for teacher in parts.teachers),
    )


def _prepared_bytes(teacher: PreparedTeacher) -> int:
    """What a prepared teacher takes on disk: its head, or a checkpoint and all weights when it is tuned whole."""
    if teacher.head != "none" or teacher.spec.prepare == "none" or teacher.spec.model == EMA:
        return 0
    if teacher.spec.prepare == "full":
        return 4 * _weight_bytes([teacher.network])
    return 4 * sum(p.numel() * 4 for p in teacher.network.head.values()) + 4096


def _weight_bytes(networks: list[Network]) -> int:
    """Bytes of all parameters, those that networks share counted once."""
    parameters = {id(p): p for network in networks for p in network.model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())
