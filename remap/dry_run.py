"""Build everything, push one batch, and say what the run would cost; nothing is trained or written."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from remap.assembly import Parts, assemble, feature_bytes, keeps_outputs
from remap.bench import Bench
from remap.data import keyed
from remap.engine.fit import StudentStep
from remap.engine.launch import accelerator, check_processes
from remap.engine.teacher import Teacher
from remap.network import Network
from remap.progress import Progress
from remap.recipe.schema import Recipe
from remap.runs.objective import without_idle_losses
from remap.teachers import needs_logits, teacher_recipe

# Images of the trial batch; time and activations grow with the number of images, so a full batch need not be pushed.
TRIAL_IMAGES = 8


@dataclass(frozen=True)
class Estimate:
    """What a run would cost on this machine.

    Attributes:
        cache_bytes, features_bytes: Kept outputs of the teacher, and kept frozen features of the student.
        memory_bytes: Weights, gradients, optimiser state and activations of one process at the full batch.
        disk_bytes: Task files and checkpoint; a prepared teacher's head is counted too.
        seconds: All of it: preparing the teacher, training and evaluation.
        preparing_seconds: Of it, giving the teacher its head.
    """

    step_seconds: float
    steps: int
    seconds: float
    preparing_seconds: float
    memory_bytes: int
    activation_bytes: int
    cache_bytes: int
    features_bytes: int
    task_bytes: int
    disk_bytes: int


def estimate(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Resolve, build, push one batch, estimate.

    Returns:
        ``recipe``, ``data``, ``teacher``, ``student``, ``trainable`` (rows of part, tensors, parameters), ``losses``
        and ``estimate``; plain values, ready for JSON.
    """
    check_processes(recipe.train.processes)
    recipe = without_idle_losses(recipe, progress).written_out()
    bench = Bench()
    parts = assemble(recipe, None, progress, bench)
    device = accelerator().device
    parts.objective.to(device)
    teacher = None
    if parts.teacher is not None and parts.objective.uses_teacher:
        teacher = Teacher(parts.teacher.network, parts.objective, accelerator(), bf16=parts.bf16)
    trial = _trial(parts, teacher)
    preparing = _preparing_seconds(parts, trial, progress, bench)
    found = _estimate(parts, teacher, trial, preparing)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": {
            "source": parts.views.data.source,
            "classes": len(parts.views.data.classes),
            "train_images": len(parts.views.train.split),
            "val_images": len(parts.views.val.split),
            "skipped": [list(item) for item in parts.views.skipped],
        },
        "teacher": _model(parts.teacher.network) if parts.teacher else None,
        "student": _model(parts.student),
        "trainable": trainable_rows(parts),
        "learning_rate": recipe.learning_rate(parts.student.anatomy.width),
        "losses": trial.losses,
        "device": str(device),
        "precision": "bf16" if parts.bf16 else "fp32",
        "estimate": asdict(found),
    }


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
class _Trial:
    """What one image costs: seconds of teacher, of the student's step and of its frozen part where that is kept,
    bytes kept for the backward pass; and the bytes of the frozen features of all images."""

    teacher_seconds: float
    student_seconds: float
    stem_seconds: float
    features_bytes: int
    activation_bytes: int
    losses: dict[str, float]


def _trial(parts: Parts, teacher: Teacher | None) -> _Trial:
    device, recipe = accelerator().device, parts.recipe
    count = min(TRIAL_IMAGES, recipe.train.batch_size)
    indices = keyed.permutation(recipe.seed, 0, len(parts.views.train.split))[:count]
    images, good = parts.views.train.batch(indices)
    images, labels = images.to(device), torch.from_numpy(parts.views.train.split.labels[good]).to(device)
    step = StudentStep(parts.student, parts.objective, bf16=parts.bf16).to(device)
    features = _features(parts)
    parts.student.attached.train()
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for attempt in range(2):  # the first warms up
        started = time.perf_counter()
        targets = teacher.targets(images, good) if teacher else {}
        _wait(device)
        asked = time.perf_counter()
        kept = step.runner.stem(images) if features else None
        _wait(device)
        begun = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(remember if attempt else _same, _same):
            total, parts_of_loss = step(images, targets, labels, kept)
        total.backward()
        losses = {name: value.item() for name, value in {"total": total, **parts_of_loss}.items()}
        done = time.perf_counter()
        for parameter in (*parts.student.trained.values(), *parts.objective.parameters()):
            parameter.grad = None
    step.runner.tap.close()
    seconds = ((asked - started) / len(good), (done - begun) / len(good), (begun - asked) / len(good))
    return _Trial(*seconds, features, sum(saved.values()) // len(good), losses)


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


def _preparing_seconds(parts: Parts, trial: _Trial, progress: Progress, bench: Bench) -> float:
    """What giving the teacher a head takes: a forward pass over the training images for a probe, else a run of its own
    (``teacher_recipe``), which is estimated like any other."""
    recipe = parts.recipe
    if parts.teacher is None or not needs_logits(recipe) or parts.teacher.head != "none":
        return 0.0
    if recipe.teacher.prepare == "probe":
        return trial.teacher_seconds * len(parts.views.train.split) / accelerator().num_processes
    tuning = assemble(teacher_recipe(recipe).written_out(), None, progress, bench)
    tuning.objective.to(accelerator().device)
    return _estimate(tuning, None, _trial(tuning, None), 0.0).seconds


def _estimate(parts: Parts, teacher: Teacher | None, trial: _Trial, preparing: float) -> Estimate:
    recipe, train = parts.recipe, parts.views.train
    spec, processes = recipe.train, accelerator().num_processes
    micro = max(1, spec.batch_size // (spec.accumulation * processes))
    trained = [*parts.student.trained.values(), *(p for p in parts.objective.parameters() if p.requires_grad)]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weights = sum(_bytes(network) for network in (parts.student, parts.teacher.network if parts.teacher else None))
    cached = teacher is not None and keeps_outputs(parts, teacher)
    cache = teacher.bytes_per_image(parts.views.view.size) * len(train.split) if cached else 0
    steps = max(1, len(train.split) // spec.batch_size) * spec.epochs
    each_step = trial.student_seconds + (0.0 if cached else trial.teacher_seconds)
    step_seconds = each_step * spec.batch_size / processes
    once = trial.teacher_seconds * (len(train.split) if cached else 0)
    once += trial.stem_seconds * (len(train.split) + len(parts.views.val.split))
    # Evaluation is a forward pass, about a third of a training step.
    passes = 1 + spec.epochs // spec.eval_every
    checks = trial.student_seconds / 3 * len(parts.views.val.split) * passes / processes
    task = sum(p.numel() * p.element_size() for p in parts.student.trained.values()) + 4096
    prepared = _prepared_bytes(parts)
    return Estimate(
        step_seconds=step_seconds,
        steps=steps,
        seconds=preparing + step_seconds * steps + once + checks,
        preparing_seconds=preparing,
        memory_bytes=weights
        + 3 * trained_bytes
        + trial.activation_bytes * micro
        + cache
        + trial.features_bytes
        + train.kept_bytes,
        activation_bytes=trial.activation_bytes * micro,
        cache_bytes=cache,
        features_bytes=trial.features_bytes,
        task_bytes=task,
        disk_bytes=task + 3 * trained_bytes + prepared,
    )


def _prepared_bytes(parts: Parts) -> int:
    """What the prepared teacher takes on disk: its head, or a checkpoint and all weights when it is tuned whole."""
    if parts.teacher is None or parts.teacher.head != "none" or parts.recipe.teacher.prepare == "none":
        return 0
    if parts.recipe.teacher.prepare == "full":
        return 4 * _bytes(parts.teacher.network)
    return 4 * sum(p.numel() * 4 for p in parts.teacher.network.head.values()) + 4096


def _bytes(network: Network | None) -> int:
    return 0 if network is None else sum(p.numel() * p.element_size() for p in network.model.parameters())
