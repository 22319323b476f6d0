"""Build everything, profile one training step, and estimate what the run would cost; nothing is trained or written."""

import time
from dataclasses import asdict
from typing import Any

from torch import nn

from remap.backbones.build import require_at_hand
from remap.data.fast_views import require_decoder
from remap.distributed.launch import accelerator, check_processes
from remap.errors import WeightsError
from remap.network import Network
from remap.pipeline.components import RunComponents, build_components
from remap.pipeline.objective import without_idle_losses
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.pipeline.profile_step import StepProfile, profile_step
from remap.pipeline.run_cost import preparation_cost, run_cost
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import OutputStorage, choose_storage, make_teacher
from remap.pipeline.trackers import require_installed
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import Recipe
from remap.recipe.teacher_checks import idle_options
from remap.recipe.train_checks import require_rate
from remap.remapping.objective import LossTerm


def estimate(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Build everything, profile one training step, and estimate.

    Returns:
        ``recipe``, ``data``, ``teacher`` (the first), ``teachers``, ``student``, ``trainable`` (rows of part, tensors,
        parameters), ``losses``, ``terms`` (what each loss costs, and which block teaches which) and ``estimate``;
        plain values, ready for JSON.
    """
    # Checked as ``start`` does it, before any network is built.
    check_processes(recipe.train.processes)
    require_rate(recipe)
    require_installed(recipe)
    if recipe.data.decode == "fast":
        require_decoder()
    recipe = without_idle_losses(recipe, progress)
    for line in idle_options(recipe, accelerator().num_processes):
        progress.say(f"note: {line}")
    recipe = _at_hand(recipe.written_out(), progress)
    shared = SharedResources(read_ahead=False)
    started = time.perf_counter()
    components = build_components(recipe, None, progress, shared)
    # Building networks is part of the cost of the run.
    building = time.perf_counter() - started
    device = accelerator().device
    components.objective.to(device)
    # A teacher that no loss reads is never run, and stores nothing.
    read = [number for number in range(len(components.teachers)) if components.objective.reads_teacher(number)]
    teachers = {number: make_teacher(components, number) for number in read}
    with progress.wait("looking for cached teacher outputs"):  # by a hash of the weights
        storages = {
            number: choose_storage(components, components.teachers[number], teacher)
            for number, teacher in teachers.items()
        }
    profile = profile_step(components, teachers, progress)
    costs = [
        preparation_cost(
            components, number, profile.teacher_seconds.get(number, 0.0), storages.get(number), progress, shared
        )
        for number in range(len(components.teachers))
    ]
    preparing, prepared = sum(seconds for seconds, _ in costs), sum(nbytes for _, nbytes in costs)
    cost = run_cost(components, teachers, storages, profile, building, preparing, prepared)
    # The first teacher also stands alone, as in older versions of this record.
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


def _at_hand(recipe: Recipe, progress: Progress) -> Recipe:
    """Return the recipe with random weights for models whose weights are not on this machine: they cost the same."""

    def estimated(spec: Any) -> Any:
        # Random weights, files, runs and the student itself need no download.
        if spec.weights != "pretrained" or is_run(spec.model) or getattr(spec, "is_student", False):
            return spec
        try:
            require_at_hand(spec.model, spec.weights, spec.image_size)
        except WeightsError:
            progress.say(f"{spec.model}: its weights are not here; estimated with random ones, the losses' values too")
            return spec.model_copy(update={"weights": "none"})
        return spec

    # A student that is cut comes from its teacher, and has no weights of its own to look for.
    student = recipe.student if recipe.student.shrink is not None else estimated(recipe.student)
    return recipe.model_copy(update={"student": student, "teachers": tuple(map(estimated, recipe.teachers))})


def _teacher(teacher: PreparedTeacher, storage: OutputStorage | None) -> dict[str, Any]:
    where = {"outputs": storage.where, "outputs_bytes": storage.bytes} if storage else {"outputs": "not read"}
    return {**_model(teacher.network), "source": teacher.spec.model, "weight": teacher.spec.weight, **where}


def _terms(components: RunComponents, profile: StepProfile, storages: dict[int, OutputStorage]) -> list[dict[str, Any]]:
    """Return what each term costs by itself: seconds and bytes of a step, bytes of its cached outputs."""
    # A step takes the time of all its passes, and the memory of one.
    rows, step, one_pass = [], components.process_images, components.pass_images
    views = len(components.training_source.split) * components.recipe.finite_views
    for name, term in components.objective.terms.items():
        assert isinstance(term, LossTerm)
        cost = profile.terms[name]
        storage = storages.get(components.objective.teacher_of[name]) if term.uses_teacher else None
        cached = storage is not None and storage.where != "each step"
        rows.append(
            {
                "name": name,
                "weight": components.objective.weights[name],
                "seconds": cost.seconds * step,
                "memory_bytes": cost.memory_bytes * one_pass,
                "cache_bytes": cost.item_bytes * views if cached else 0,
                "blocks": [list(pair) for pair in term.blocks],
            }
        )
    return rows


def _model(network: Network) -> dict[str, Any]:
    # Shown apart: it depends on the classes, not on the method.
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
