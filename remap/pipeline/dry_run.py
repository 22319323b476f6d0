"""Build everything, push one batch, and say what the run would cost; nothing is trained or written."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from remap.distributed.launch import accelerator, check_processes
from remap.engine.job import bytes_of_a_run
from remap.engine.teacher import Teacher
from remap.network import Network
from remap.pipeline.assemble import RunComponents, assemble
from remap.pipeline.idle_losses import without_idle_losses
from remap.pipeline.profile_step import StepProfile, profile_step
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import OutputStorage, choose_storage, make_teacher
from remap.pipeline.teachers import PreparedTeacher, needs_logits, teacher_recipe
from remap.progress import Progress
from remap.recipe.schema import Recipe

# Bytes of task.json, about.
TASK_RECORD = 4096


@dataclass(frozen=True)
class Estimate:
    """What a run would cost on this machine.

    Attributes:
        cache_bytes, disk_cache_bytes: Kept outputs of the teachers, in memory and on disk.
        features_bytes: Kept frozen features of the student.
        memory_bytes: Weights, gradients, optimiser state and activations of one process at the full batch; where that
            is a GPU's memory, without what is kept in that of the machine (images, outputs, features).
        run_bytes: Checkpoints and task: the free space that the run asks for before it trains.
        disk_bytes: That, a prepared teacher and what is kept on disk of the teachers' outputs.
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
    run_bytes: int
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
    bench = SharedResources()
    started = time.perf_counter()
    parts = assemble(recipe, None, progress, bench)
    building = time.perf_counter() - started
    device = accelerator().device
    parts.objective.to(device)
    numbers = [number for number in range(len(parts.teachers)) if parts.objective.reads_teacher(number)]
    teachers = {number: make_teacher(parts, number) for number in numbers}
    places = {number: choose_storage(parts, parts.teachers[number], teacher) for number, teacher in teachers.items()}
    trial = profile_step(parts, teachers)
    made = [
        _preparing(parts, teacher, trial.teacher_seconds.get(number, 0.0), progress, bench)
        for number, teacher in enumerate(parts.teachers)
    ]
    preparing, prepared = sum(seconds for seconds, _ in made), sum(nbytes for _, nbytes in made)
    found = _estimate(parts, teachers, places, trial, building, preparing, prepared)
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


def _teacher(teacher: PreparedTeacher, place: OutputStorage | None) -> dict[str, Any]:
    where = {"outputs": place.where, "outputs_bytes": place.bytes} if place else {"outputs": "not read"}
    return {**_model(teacher.network), "source": teacher.spec.model, "weight": teacher.spec.weight, **where}


def _terms(parts: RunComponents, trial: StepProfile, places: dict[int, OutputStorage]) -> list[dict[str, Any]]:
    """What each term costs by itself: seconds and bytes of one step, bytes of kept teacher outputs for all images."""
    rows, size = [], parts.recipe.train.batch_size // parts.recipe.train.accumulation
    views = len(parts.lessons.split) * parts.recipe.data.finite_views
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


def trainable_rows(parts: RunComponents) -> list[dict[str, Any]]:
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


def _preparing(
    parts: RunComponents, teacher: PreparedTeacher, each: float, progress: Progress, bench: SharedResources
) -> tuple[float, int]:
    """Seconds and bytes on disk of giving a teacher a head: a forward pass over the labelled images for a probe, else a
    run of its own (``teacher_recipe``), which is estimated like any other.

    Args:
        each: Seconds of the teacher's forward pass for one image.
    """
    recipe, spec = parts.recipe, teacher.spec
    if not needs_logits(recipe) or teacher.head != "none":
        return 0.0, 0
    if spec.prepare == "probe":
        head = sum(p.nbytes for p in teacher.network.head.values())
        return each * len(parts.views.train.split) / accelerator().num_processes, head + TASK_RECORD
    tuning = assemble(teacher_recipe(recipe, spec).written_out(), None, progress, bench)
    tuning.objective.to(accelerator().device)
    found = _estimate(tuning, {}, {}, profile_step(tuning, {}))
    return found.seconds, found.disk_bytes


def _estimate(
    parts: RunComponents,
    teachers: dict[int, Teacher],
    places: dict[int, OutputStorage],
    trial: StepProfile,
    building: float = 0.0,
    preparing: float = 0.0,
    prepared_bytes: int = 0,
) -> Estimate:
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
    once = sum(trial.teacher_seconds[number] for number in kept) * len(lessons.split) * recipe.data.finite_views
    once += trial.stem_seconds * (len(lessons.split) + len(val.split))
    passes = 1 + -(-spec.epochs // spec.eval_every)  # before the first epoch, and always behind the last
    test = parts.views.test
    evaluated = passes * len(val.split) + (0 if test is None else len(test.split))
    checks = trial.forward_seconds * evaluated / processes
    if needs_logits(recipe):  # the teachers are evaluated once
        checks += sum(trial.teacher_seconds.values()) * len(val.split) / processes
    task = sum(p.numel() * p.element_size() for p in parts.student.trained.values()) + TASK_RECORD
    of_run = bytes_of_a_run(parts.student, parts.objective, list(teachers.values()))
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
        run_bytes=of_run,
        disk_bytes=of_run + prepared_bytes + on_disk,
    )


def _weight_bytes(networks: list[Network]) -> int:
    """Bytes of all parameters, those that networks share counted once."""
    parameters = {id(p): p for network in networks for p in network.model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())
