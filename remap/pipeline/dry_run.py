"""Build everything, profile one training step, and estimate what the run would cost; nothing is trained or written."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from remap.distributed.launch import accelerator, check_processes
from remap.engine.job import bytes_of_a_run
from remap.engine.teacher import Teacher
from remap.network import Network
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.profile_step import StepProfile, profile_step
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import OutputStorage, choose_storage, make_teacher
from remap.pipeline.teachers import PreparedTeacher, needs_logits, teacher_recipe
from remap.progress import Progress
from remap.recipe.schema import Recipe
from remap.remapping.objective import LossTerm

# Bytes of task.json, about.
TASK_RECORD = 4096


@dataclass(frozen=True)
class Estimate:
    """What a run would cost on this machine.

    Attributes:
        cache_bytes, disk_cache_bytes: Cached outputs of the teachers, in memory and on disk.
        features_bytes: Cached frozen features of the student.
        memory_bytes: Weights, gradients, optimiser state and activations of one process at the full batch; on a CPU
            also what is held in memory of images, outputs and features.
        run_bytes: Checkpoints and task: the free space that the run requires before it trains.
        disk_bytes: ``run_bytes``, a prepared teacher and teacher outputs that are cached on disk.
        seconds: Of the whole run: building networks, reading images, preparing the teacher, training, evaluation.
        preparing_seconds: Part of ``seconds``: giving the teacher its head.
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
    """Build everything, profile one training step, and estimate.

    Returns:
        ``recipe``, ``data``, ``teacher`` (the first), ``teachers``, ``student``, ``trainable`` (rows of part, tensors,
        parameters), ``losses``, ``terms`` (what each loss costs, and which block teaches which) and ``estimate``;
        plain values, ready for JSON.
    """
    check_processes(recipe.train.processes)
    recipe = without_idle_losses(recipe, progress).written_out()
    shared = SharedResources()
    started = time.perf_counter()
    components = build_components(recipe, None, progress, shared)
    # Building networks and decoding images is part of the cost of the run.
    building = time.perf_counter() - started
    device = accelerator().device
    components.objective.to(device)
    read = [number for number in range(len(components.teachers)) if components.objective.reads_teacher(number)]
    teachers = {number: make_teacher(components, number) for number in read}
    storages = {
        number: choose_storage(components, components.teachers[number], teacher) for number, teacher in teachers.items()
    }
    profile = profile_step(components, teachers)
    costs = [
        _preparing(components, teacher, profile.teacher_seconds.get(number, 0.0), progress, shared)
        for number, teacher in enumerate(components.teachers)
    ]
    preparing, prepared = sum(seconds for seconds, _ in costs), sum(nbytes for _, nbytes in costs)
    cost = _estimate(components, teachers, storages, profile, building, preparing, prepared)
    described = [_teacher(teacher, storages.get(number)) for number, teacher in enumerate(components.teachers)]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": {
            "source": components.views.data.source,
            "classes": len(components.views.data.classes),
            "train_images": len(components.training_source.split),
            "labeled_images": round(len(components.training_source.split) * components.labeled_share),
            "val_images": len(components.views.val.split),
            "skipped": [list(item) for item in components.views.skipped],
        },
        "teacher": described[0] if described else None,
        "teachers": described,
        "student": _model(components.student),
        "trainable": trainable_rows(components),
        "learning_rate": recipe.learning_rate(components.student.anatomy.width),
        "losses": profile.losses,
        "terms": _terms(components, profile, storages),
        "device": str(device),
        "precision": "bf16" if components.bf16 else "fp32",
        "estimate": asdict(cost),
    }


def _teacher(teacher: PreparedTeacher, storage: OutputStorage | None) -> dict[str, Any]:
    where = {"outputs": storage.where, "outputs_bytes": storage.bytes} if storage else {"outputs": "not read"}
    return {**_model(teacher.network), "source": teacher.spec.model, "weight": teacher.spec.weight, **where}


def _terms(components: RunComponents, profile: StepProfile, storages: dict[int, OutputStorage]) -> list[dict[str, Any]]:
    """Return what each term costs by itself: seconds and bytes of a step, bytes of its cached outputs."""
    rows, size = [], components.recipe.train.batch_size // components.recipe.train.accumulation
    views = len(components.training_source.split) * components.recipe.data.finite_views
    for name, term in components.objective.terms.items():
        assert isinstance(term, LossTerm)
        cost = profile.terms[name]
        storage = storages.get(components.objective.teacher_of[name]) if term.uses_teacher else None
        cached = storage is not None and storage.where != "each step"
        rows.append(
            {
                "name": name,
                "weight": components.objective.weights[name],
                "seconds": cost.seconds * size,
                "memory_bytes": cost.memory_bytes * size,
                "cache_bytes": cost.item_bytes * views if cached else 0,
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


def trainable_rows(components: RunComponents) -> list[dict[str, Any]]:
    """Return one row per part that is trained: method, head and, for each loss, its projectors."""
    # Method and head first, in the order of the table.
    groups: dict[str, list[nn.Parameter]] = {components.recipe.method.name: [], "head": []}
    for name, parameter in components.student.trained.items():
        groups["head" if components.student.anatomy.is_head(name) else components.recipe.method.name].append(parameter)
    for name, term in components.objective.terms.items():
        projectors = [p for p in term.parameters() if p.requires_grad]
        if projectors:
            groups[f"projector of {name} (training only)"] = projectors
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
    components: RunComponents, teacher: PreparedTeacher, each: float, progress: Progress, shared: SharedResources
) -> tuple[float, int]:
    """Return seconds and bytes on disk of giving a teacher a head.

    That is a forward pass over the labelled images for a probe, else a run, which is estimated like any other.

    Args:
        each: Seconds of the teacher's forward pass for one image.
    """
    recipe, spec = components.recipe, teacher.spec
    if not needs_logits(recipe) or teacher.head != "none":
        return 0.0, 0
    if spec.prepare == "probe":
        head = sum(p.nbytes for p in teacher.network.head.values())
        return each * len(components.views.train.split) / accelerator().num_processes, head + TASK_RECORD
    # A tuned teacher costs a whole run by itself.
    tuning = build_components(teacher_recipe(recipe, spec).written_out(), None, progress, shared)
    tuning.objective.to(accelerator().device)
    cost = _estimate(tuning, {}, {}, profile_step(tuning, {}))
    return cost.seconds, cost.disk_bytes


def _estimate(
    components: RunComponents,
    teachers: dict[int, Teacher],
    storages: dict[int, OutputStorage],
    profile: StepProfile,
    building: float = 0.0,
    preparing: float = 0.0,
    prepared_bytes: int = 0,
) -> Estimate:
    recipe, training_source, val = components.recipe, components.training_source, components.views.val
    spec, processes = recipe.train, accelerator().num_processes
    # Activations of one pass are held at a time, whatever the batch.
    micro = max(1, spec.batch_size // (spec.accumulation * processes))
    trained = [*components.student.trained.values(), *(p for p in components.objective.parameters() if p.requires_grad)]
    # Times three below: gradients and the two moments of AdamW.
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weights = _weight_bytes([components.student, *(teacher.network for teacher in components.teachers)])
    cached = {number for number, storage in storages.items() if storage.where != "each step"}
    steps = max(1, len(training_source.split) // spec.batch_size) * spec.epochs
    online = sum(seconds for number, seconds in profile.teacher_seconds.items() if number not in cached)
    step_seconds = (profile.student_seconds + online) * spec.batch_size / processes
    once = (
        sum(profile.teacher_seconds[number] for number in cached)
        * len(training_source.split)
        * recipe.data.finite_views
    )
    once += profile.stem_seconds * (len(training_source.split) + len(val.split))
    passes = 1 + -(-spec.epochs // spec.eval_every)  # before the first epoch, and always after the last
    test = components.views.test
    evaluated = passes * len(val.split) + (0 if test is None else len(test.split))
    # Evaluation divides images among processes, too.
    checks = profile.forward_seconds * evaluated / processes
    if needs_logits(recipe):  # the teachers are evaluated once
        checks += sum(profile.teacher_seconds.values()) * len(val.split) / processes
    task = sum(p.numel() * p.element_size() for p in components.student.trained.values()) + TASK_RECORD
    of_run = bytes_of_a_run(components.student, components.objective, list(teachers.values()))
    in_memory = sum(storage.bytes for storage in storages.values() if storage.where == "memory")
    on_disk = sum(storage.bytes for storage in storages.values() if storage.where == "disk")
    return Estimate(
        step_seconds=step_seconds,
        steps=steps,
        seconds=building + preparing + step_seconds * steps + once + checks,
        preparing_seconds=preparing,
        memory_bytes=weights
        + 3 * trained_bytes
        + profile.activation_bytes * micro
        + (
            # On a GPU these are in the memory of the machine.
            in_memory + profile.features_bytes + training_source.cached_bytes
            if accelerator().device.type == "cpu"
            else 0
        ),
        activation_bytes=profile.activation_bytes * micro,
        cache_bytes=in_memory,
        disk_cache_bytes=on_disk,
        features_bytes=profile.features_bytes,
        task_bytes=task,
        run_bytes=of_run,
        disk_bytes=of_run + prepared_bytes + on_disk,
    )


def _weight_bytes(networks: list[Network]) -> int:
    """Return the bytes of all parameters; those that networks share count once."""
    parameters = {id(p): p for network in networks for p in network.model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())
