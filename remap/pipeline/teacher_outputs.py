"""Where a teacher's outputs come from in training: computed in every step, or cached in memory or on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from remap.cache.cache_folders import cache_root, has_cache, require_space
from remap.cache.output_format import OutputFormat
from remap.cache.output_store import OutputStore, bytes_for
from remap.cache.teacher_cache import InMemory, cache_in_memory, missing_rows
from remap.distributed.launch import accelerator
from remap.engine.joint_teacher import JointTeacher
from remap.engine.teacher import AverageTeacher, Teacher
from remap.errors import DataError, RemapError, RunError
from remap.pipeline.components import RunComponents
from remap.pipeline.disk_outputs import items_on_disk, key_on_disk, store_on_disk
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_shares import finite_views, frozen_teacher, known_outputs, shares
from remap.progress import Progress, Silent
from remap.recipe.schema import EMA
from remap.recipe.teacher_checks import what_changes


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
    teacher = frozen_teacher(components, network, number)
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
            store_on_disk(components, teacher, prepared, storage.shapes, progress)
        elif components.recipe.finite_views and prepared.spec.cache == "auto" and not prepared.spec.learns:
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
    count = len(components.training_source.split) * components.recipe.finite_views
    # Items are float32 in memory, in the dtype of the recipe on disk.
    in_memory = count * sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    items = items_on_disk(spec, shapes, bf16=components.bf16)
    on_disk = bytes_for(items, count)
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
    # The first fold's outputs stand for those of all.
    folds = prepared.folds
    fingerprint = prepared.fingerprint if folds is None else folds.fingerprint(1, Silent())
    key = key_on_disk(components, prepared, fingerprint)
    may_hold = fits and spec.cache == "auto" and not spec.keeps_less and folds is None
    # Where there is no choice, room is checked once it is known what is missing.
    if has_cache(cache_root(), key) and not (may_hold and _lacks_room(components, key, items, on_disk)):
        return OutputStorage("disk", on_disk, shapes)
    # top_k and cache_dtype only have a meaning on disk.
    if spec.cache == "disk" or spec.keeps_less:
        require_space(cache_root(), on_disk)
        return OutputStorage("disk", on_disk, shapes)
    if fits:
        return OutputStorage("memory", in_memory, shapes)
    if spec.folds:  # which have no teacher that could run in every step
        require_space(cache_root(), on_disk)
    return _disk_if_it_fits(on_disk, shapes)


def _lacks_room(
    components: RunComponents, key: Mapping[str, Any], items: Mapping[str, OutputFormat], needed: int
) -> bool:
    """Return whether the disk has no room for the rows that a store lacks, of ``needed`` bytes in all."""
    if _disk_if_it_fits(needed, {}).where == "disk":
        return False  # without a look at each row
    try:
        with OutputStore.open(cache_root(), key, items) as store:
            lacking = missing_rows(store, finite_views(components), components.process_images)
        require_space(cache_root(), bytes_for(items, lacking))
    except RunError:  # the recipe leaves the choice open, so a full disk is no error
        return True
    return False


def _disk_if_it_fits(needed: int, shapes: dict[str, tuple[int, ...]]) -> OutputStorage:
    try:
        require_space(cache_root(), needed)
    except RemapError:  # the recipe leaves the choice open, so a full disk is no error
        return OutputStorage("each step", 0, shapes)
    return OutputStorage("disk", needed, shapes)


def _cache_in_memory(
    components: RunComponents,
    teacher: Teacher,
    prepared: PreparedTeacher,
    storage: OutputStorage,
    shared: SharedResources,
    progress: Progress,
) -> None:
    recipe = components.recipe
    source, names = str(recipe.data.model_dump(mode="json")), tuple(storage.shapes)
    seed = recipe.seed if recipe.data.augment != "none" else None  # fixed views are the same for every seed
    batch, in_pass = components.process_images, components.pass_images
    # The size of a pass is part of the key: it may decide the last bits.
    # So is the number of views, which goes by the epochs: cells of a comparison may differ in them.
    by_size = (recipe.finite_views, in_pass)
    key: tuple = (prepared.fingerprint, source, components.views.view, names, seed, components.bf16, *by_size)
    if prepared.folds is not None:
        key += (prepared.folds.digest,)
    if key not in shared.targets:
        cached: InMemory | None = None
        for share in shares(components, teacher, prepared, progress):
            known = known_outputs(components, prepared, set(names), share.views, cached)
            if known is None:
                sizes = (batch, in_pass)
                known = cache_in_memory(share.teacher, share.views, *sizes, accelerator(), progress, cached)
            cached = known
        shared.targets[key] = cached
    teacher.cached = shared.targets[key]
