"""Where a teacher's outputs come from in training: computed in every step, or cached in memory or on disk."""

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from remap.cache.cache_folders import CacheKey, cache_root, has_cache, library_versions, require_space
from remap.cache.output_format import OutputFormat
from remap.cache.output_store import LEAST_MASS, OutputStore, bytes_for
from remap.cache.passes import outputs_of
from remap.cache.teacher_cache import FiniteViews, InMemory, cache_in_memory, cache_on_disk, missing_rows
from remap.data.images import ALWAYS_OPAQUE
from remap.distributed.launch import accelerator
from remap.engine.joint_teacher import JointTeacher
from remap.engine.teacher import AverageTeacher, Teacher
from remap.errors import DataError, RemapError
from remap.io.human_size import duration, number_of, size
from remap.pipeline.components import RunComponents
from remap.pipeline.shared import SharedResources
from remap.pipeline.teachers import PreparedTeacher
from remap.progress import Progress
from remap.recipe.checks import what_changes
from remap.recipe.schema import EMA, TeacherSpec
from remap.remapping.targets import LOGITS


@dataclass(frozen=True)
class OutputStorage:
    """Where the outputs of one teacher are cached, and what that takes.

    Attributes:
        bytes: In memory or on disk, for all images and views; 0 where they are computed in every step.
        shapes: Shape of one image's row of each output; empty where none are cached.
    """

    where: Literal["each step", "memory", "disk"]
    bytes: int
    shapes: dict[str, tuple[int, ...]]


def make_teacher(components: RunComponents, number: int) -> Teacher:
    """Return a teacher that gives what the objective reads, without any cached outputs."""
    prepared = components.teachers[number]
    network, objective, bf16 = prepared.network, components.objective, components.bf16
    if prepared.spec.model == EMA:
        decay, sees_plain = prepared.spec.decay, components.recipe.brings_average
        return AverageTeacher(network, objective, number, accelerator(), bf16=bf16, decay=decay, sees_plain=sees_plain)
    if prepared.spec.joint:
        return JointTeacher(network, objective, number, accelerator(), bf16=bf16, student=components.student)
    teacher = Teacher(network, objective, number, accelerator(), bf16=bf16)
    if bf16 and not prepared.spec.is_student:  # which has the student's tensors
        teacher.hold_bf16()
    return teacher


def teachers_in_training(components: RunComponents, shared: SharedResources, progress: Progress) -> list[Teacher]:
    """Return the teachers that the objective reads; where views are finite, with their outputs cached."""
    teachers = []
    for number, prepared in enumerate(components.teachers):
        if not components.objective.reads_teacher(number):
            continue
        teacher = make_teacher(components, number)
        teachers.append(teacher)
        storage = choose_storage(components, prepared, teacher)
        if storage.where == "memory":
            _cache_in_memory(components, teacher, prepared, storage, shared, progress)
        elif storage.where == "disk":
            store_on_disk(components, teacher, prepared, storage, progress)
        elif components.recipe.data.finite_views and prepared.spec.cache == "auto" and not prepared.spec.learns:
            progress.say(
                "the teacher runs in every step: its outputs fit neither in memory (data.memory_gib) nor on the disk"
            )
        prepared.one_pass = None  # which other runs of a comparison have no use for
        components.teachers[number] = replace(prepared, outputs=storage.where)
    return teachers


def choose_storage(components: RunComponents, prepared: PreparedTeacher, teacher: Teacher) -> OutputStorage:
    """Choose by the recipe, by what is cached on disk already, and by room.

    Raises:
        DataError: The recipe wants them cached where they do not fit, or where views are not finite.
    """
    spec, data = prepared.spec, components.recipe.data
    # Cached outputs are only right while an image always looks the same.
    changing = what_changes(spec, data)
    if changing is not None and spec.cache in ("memory", "disk"):
        raise DataError(
            f"the outputs of the teacher {spec.model} cannot be cached: {changing}", given=f"teacher.cache={spec.cache}"
        )
    if changing is not None or spec.cache == "off":
        return OutputStorage("each step", 0, {})
    shapes = teacher.shapes(components.views.view.shape)
    count = len(components.training_source.split) * data.finite_views
    # Items are float32 in memory, in the dtype of the recipe on disk.
    in_memory = count * sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    on_disk = bytes_for(_items(spec, shapes, bf16=components.bf16), count)
    fits = in_memory <= data.memory_gib * 2**30
    if spec.cache == "memory" and not fits:
        raise DataError(
            "the teacher's outputs do not fit in memory",
            given=f"{in_memory / 2**30:.1f} GiB for {count} views of images",
            allowed=f"data.memory_gib={data.memory_gib:g}",
            do="allow more (--set data.memory_gib=...), or cache them on disk (--set teacher.cache=disk)",
        )
    # What the user chose is obeyed or refused, never replaced.
    if spec.cache == "memory":
        return OutputStorage("memory", in_memory, shapes)
    if has_cache(cache_root(), _key(components, prepared)):  # room for missing rows is checked once they are known
        return OutputStorage("disk", on_disk, shapes)
    # top_k and cache_dtype only have a meaning on disk.
    if spec.cache == "disk" or spec.keeps_less:
        require_space(cache_root(), on_disk)
        return OutputStorage("disk", on_disk, shapes)
    return OutputStorage("memory", in_memory, shapes) if fits else _disk_if_it_fits(on_disk, shapes)


def _disk_if_it_fits(needed: int, shapes: dict[str, tuple[int, ...]]) -> OutputStorage:
    try:
        require_space(cache_root(), needed)
    except RemapError:  # the recipe leaves the choice open, so a full disk is no error
        return OutputStorage("each step", 0, shapes)
    return OutputStorage("disk", needed, shapes)


def _items(spec: TeacherSpec, shapes: dict[str, tuple[int, ...]], *, bf16: bool) -> dict[str, OutputFormat]:
    """Return how each output is stored on disk."""
    dtype = ("fp16" if bf16 else "fp32") if spec.cache_dtype == "auto" else spec.cache_dtype
    return {name: OutputFormat(shape, dtype, spec.top_k if name == LOGITS else None) for name, shape in shapes.items()}


def finite_views(components: RunComponents) -> FiniteViews:
    """Return all views of all training images, where they are finite."""
    data = components.recipe.data
    return FiniteViews(components.training_source, data.augmentation, components.recipe.seed, data.finite_views)


def _cache_in_memory(
    components: RunComponents,
    teacher: Teacher,
    prepared: PreparedTeacher,
    storage: OutputStorage,
    shared: SharedResources,
    progress: Progress,
) -> None:
    recipe, views = components.recipe, finite_views(components)
    source, names = str(recipe.data.model_dump(mode="json")), tuple(storage.shapes)
    seed = recipe.seed if recipe.data.augment != "none" else None  # fixed views are the same for every seed
    batch, in_pass = components.process_images, components.pass_images
    # The size of a pass is part of the key: it may decide the last bits.
    key = (prepared.fingerprint, source, components.views.view, names, seed, components.bf16, in_pass)
    if key not in shared.targets:
        known = _known(components, prepared, storage)
        shared.targets[key] = known or cache_in_memory(teacher, views, batch, in_pass, accelerator(), progress)
    teacher.cached = shared.targets[key]


def store_on_disk(
    components: RunComponents,
    teacher: Teacher,
    prepared: PreparedTeacher,
    storage: OutputStorage,
    progress: Progress,
    *,
    timed: bool = False,
) -> dict[str, Any]:
    """Compute the rows that the store lacks, give the store to the teacher, and return what was done.

    Args:
        timed: Say beforehand how long it takes; two batches are computed to know.
    """
    views, batch = finite_views(components), components.process_images
    items = _items(prepared.spec, storage.shapes, bf16=components.bf16)
    store = OutputStore.open(cache_root(), _key(components, prepared), items)
    started, missing = time.perf_counter(), missing_rows(store, views, batch)
    if missing:
        cost = size(bytes_for(items, missing))
        if timed:
            batches = missing / batch / accelerator().num_processes
            cost += f", about {duration(batches * _batch_seconds(teacher, views, batch, components.pass_images))}"
        progress.say(
            f"caching teacher outputs on disk: {number_of(len(views.source.split), 'image')} x"
            f" {number_of(views.views, 'view')}, "
            f"{missing:,} of {views.count:,} to compute, {cost}"
        )
    # Only what is missing has to fit.
    require_space(cache_root(), bytes_for(items, missing))
    known = _known(components, prepared, storage) if missing else None
    cached = cache_on_disk(teacher, store, views, batch, components.pass_images, accelerator(), progress, known)
    teacher.cached = cached
    progress.say(f"teacher outputs on disk: {store.folder} ({cached.computed:,} computed now, {size(store.nbytes)})")
    if store.damaged:
        progress.say(f"{store.damaged} damaged records were computed again")
    # Too few classes change what the student learns; say so instead of failing.
    if cached.mass is not None and cached.mass < LEAST_MASS:
        progress.say(
            f"the {prepared.spec.top_k} stored classes have {cached.mass:.0%} of the teacher's probability on average; "
            "the rest is spread evenly over the others (raise teacher.top_k, or leave it out)"
        )
    sizes = {name: bytes_for({name: form}, views.count) for name, form in items.items()}
    return {
        "key": store.folder.name,
        "folder": str(store.folder),
        "items": [{"name": n, "shape": list(form.shape), "bytes": sizes[n]} for n, form in items.items()],
        "images": views.count,
        "computed": cached.computed,
        "bytes": store.nbytes,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _known(components: RunComponents, prepared: PreparedTeacher, storage: OutputStorage) -> InMemory | None:
    """Return the outputs that fitting the teacher's head has given already."""
    if prepared.one_pass is None:
        return None
    sizes = components.process_images, components.pass_images
    return prepared.one_pass.outputs(set(storage.shapes), finite_views(components), *sizes, components.bf16)


def _batch_seconds(teacher: Teacher, views: FiniteViews, batch: int, at_once: int) -> float:
    """Return how long a batch takes, from files to outputs; that of the second one, since the first warms up."""
    indices, started = np.arange(min(batch, len(views.source.split))), 0.0
    for _ in range(2):
        started = time.perf_counter()
        for value in outputs_of(teacher, views.images(0, indices)[0], batch, at_once).values():
            value.cpu()  # waits for a GPU
    return time.perf_counter() - started


def _key(components: RunComponents, prepared: PreparedTeacher) -> dict[str, Any]:
    """Return everything besides the image and its draw that decides what is stored."""
    network, view = prepared.network, components.views.view
    if all(name.lower().endswith(ALWAYS_OPAQUE) for name in components.training_source.split.names):
        view = replace(view, pixels=replace(view.pixels, alpha="drop"))  # what earlier versions cached is right
    return CacheKey(
        teacher=network.identity.model,
        state=prepared.fingerprint,
        preprocessing=network.preprocess.to_dict(),
        view={**view.to_dict(), "augment": components.recipe.data.augmentation.key()},
        precision="bf16" if components.bf16 else "fp32",
        versions=library_versions(),
    ).to_dict()
