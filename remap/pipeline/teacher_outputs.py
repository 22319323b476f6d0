"""Where a teacher's outputs are kept: computed in every step, once in memory, or once on disk for later runs too."""

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from remap.cache.folders import CacheKey, cache_root, has_cache, library_versions, require_space
from remap.cache.records import LEAST_MASS, Item, RecordStore, bytes_for
from remap.cache.teacher_cache import FiniteViews, keep_in_memory, keep_on_disk, missing_rows
from remap.distributed.launch import accelerator
from remap.engine.teacher import AverageTeacher, Teacher
from remap.errors import DataError, RemapError
from remap.io.atomic_write import size
from remap.pipeline.assemble import RunComponents, images_at_once, images_of_process
from remap.pipeline.shared import SharedResources
from remap.pipeline.teachers import PreparedTeacher
from remap.progress import Progress
from remap.recipe.checks import what_changes
from remap.recipe.schema import EMA, TeacherSpec
from remap.remapping.items import LOGITS


@dataclass(frozen=True)
class OutputStorage:
    """Where the outputs of one teacher are kept, and what that takes.

    Attributes:
        bytes: In memory or on disk, for all images and views; 0 where they are computed in every step.
        shapes: Shape of one image's row of each item; empty where none are kept.
    """

    where: Literal["each step", "memory", "disk"]
    bytes: int
    shapes: dict[str, tuple[int, ...]]


def make_teacher(parts: RunComponents, number: int) -> Teacher:
    """A teacher as the objective asks it, without any kept outputs."""
    prepared = parts.teachers[number]
    arguments = (prepared.network, parts.objective, number, accelerator())
    if prepared.spec.model == EMA:
        return AverageTeacher(*arguments, bf16=parts.bf16, decay=prepared.spec.decay)
    return Teacher(*arguments, bf16=parts.bf16)


def teachers_in_training(parts: RunComponents, bench: SharedResources, progress: Progress) -> list[Teacher]:
    """The teachers behind the objective; where views are a closed list their outputs are computed once and kept."""
    found = []
    for number, prepared in enumerate(parts.teachers):
        if not parts.objective.reads_teacher(number):
            continue
        teacher = make_teacher(parts, number)
        found.append(teacher)
        place = choose_storage(parts, prepared, teacher)
        if place.where == "memory":
            _in_memory(parts, teacher, prepared, place, bench, progress)
        elif place.where == "disk":
            _on_disk(parts, teacher, prepared, place, progress)
        elif parts.recipe.data.finite_views and prepared.spec.cache == "auto" and prepared.spec.model != EMA:
            progress.say(
                "the teacher is asked in every step: its outputs fit neither in data.memory_gib nor on the disk"
            )
        parts.teachers[number] = replace(prepared, outputs=place.where)
    return found


def choose_storage(parts: RunComponents, prepared: PreparedTeacher, teacher: Teacher) -> OutputStorage:
    """Decide by the recipe, by what there is on disk, and by room.

    Raises:
        DataError: The recipe names a place where they do not fit, or where views are no closed list.
    """
    spec, data = prepared.spec, parts.recipe.data
    changing = what_changes(spec, data)
    if changing is not None and spec.cache in ("memory", "disk"):
        raise DataError(
            f"the outputs of the teacher {spec.model} cannot be kept: {changing}", given=f"teacher.cache={spec.cache}"
        )
    if changing is not None or spec.cache == "off":
        return OutputStorage("each step", 0, {})
    shapes = teacher.shapes(parts.views.view.size)
    count = len(parts.lessons.split) * data.finite_views
    in_memory = count * sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    on_disk = bytes_for(_items(spec, shapes, bf16=parts.bf16), count)
    fits = in_memory <= data.memory_gib * 2**30
    if spec.cache == "memory" and not fits:
        raise DataError(
            "the teacher's outputs do not fit in memory",
            given=f"{in_memory / 2**30:.1f} GiB for {count} views of images",
            allowed=f"data.memory_gib={data.memory_gib:g}",
            do="allow more (--set data.memory_gib=...), or keep them on disk (--set teacher.cache=disk)",
        )
    if spec.cache == "memory":
        return OutputStorage("memory", in_memory, shapes)
    if has_cache(cache_root(), _key(parts, prepared)):  # room for what it lacks is looked for once that is known
        return OutputStorage("disk", on_disk, shapes)
    if spec.cache == "disk" or spec.keeps_less:
        require_space(cache_root(), on_disk)
        return OutputStorage("disk", on_disk, shapes)
    return OutputStorage("memory", in_memory, shapes) if fits else _disk_if_it_fits(on_disk, shapes)


def _disk_if_it_fits(needed: int, shapes: dict[str, tuple[int, ...]]) -> OutputStorage:
    try:
        require_space(cache_root(), needed)
    except RemapError:
        return OutputStorage("each step", 0, shapes)
    return OutputStorage("disk", needed, shapes)


def _items(spec: TeacherSpec, shapes: dict[str, tuple[int, ...]], *, bf16: bool) -> dict[str, Item]:
    """How each item is kept on disk."""
    dtype = ("fp16" if bf16 else "fp32") if spec.cache_dtype == "auto" else spec.cache_dtype
    return {name: Item(shape, dtype, spec.top_k if name == LOGITS else None) for name, shape in shapes.items()}


def build_caches(parts: RunComponents, progress: Progress) -> list[dict[str, Any]]:
    """Keep the outputs of every teacher of a run on disk, without training.

    Raises:
        DataError: A teacher's outputs cannot be kept.
    """
    found = []
    for number, prepared in enumerate(parts.teachers):
        if prepared.spec.model == EMA or not parts.objective.reads_teacher(number):
            continue  # a running average changes in training
        prepared.spec = prepared.spec.model_copy(update={"cache": "disk"})
        teacher = make_teacher(parts, number)
        try:
            place = choose_storage(parts, prepared, teacher)
            found.append({"teacher": prepared.spec.model, **_on_disk(parts, teacher, prepared, place, progress)})
        finally:
            teacher.close()
    return found


def finite_views(parts: RunComponents) -> FiniteViews:
    """All that the student sees, where that is a closed list."""
    data = parts.recipe.data
    return FiniteViews(parts.lessons, data.augment, parts.recipe.seed, data.finite_views)


def _in_memory(
    parts: RunComponents,
    teacher: Teacher,
    prepared: PreparedTeacher,
    place: OutputStorage,
    bench: SharedResources,
    progress: Progress,
) -> None:
    source, names = str(parts.recipe.data.model_dump(mode="json")), tuple(place.shapes)
    seed = parts.recipe.seed if parts.recipe.data.augment != "none" else None
    key = (prepared.fingerprint, source, parts.views.view, names, seed, parts.bf16, images_at_once(parts))
    if key in bench.targets:
        teacher.kept = bench.targets[key]
        return
    batch = images_of_process(parts)
    teacher.kept = keep_in_memory(teacher, finite_views(parts), batch, images_at_once(parts), accelerator(), progress)
    bench.targets[key] = teacher.kept


def _on_disk(
    parts: RunComponents, teacher: Teacher, prepared: PreparedTeacher, place: OutputStorage, progress: Progress
) -> dict[str, Any]:
    """Fill the gaps of the store and leave it with the teacher; says what was done."""
    items = _items(prepared.spec, place.shapes, bf16=parts.bf16)
    store = RecordStore.open(cache_root(), _key(parts, prepared), items)
    started, batch = time.perf_counter(), images_of_process(parts)
    lacking = missing_rows(store, finite_views(parts), batch)
    if lacking:
        progress.say(
            f"keeping teacher outputs on disk: {lacking:,} of {finite_views(parts).count:,} to compute, "
            f"{size(bytes_for(items, lacking))}"
        )
    require_space(cache_root(), bytes_for(items, lacking))
    kept = teacher.kept = keep_on_disk(
        teacher, store, finite_views(parts), batch, images_at_once(parts), accelerator(), progress
    )
    progress.say(f"teacher outputs on disk: {store.folder} ({kept.computed:,} computed now, {size(store.nbytes)})")
    if store.damaged:
        progress.say(f"{store.damaged} damaged records were computed again")
    if kept.mass is not None and kept.mass < LEAST_MASS:
        progress.say(
            f"the {prepared.spec.top_k} classes kept have {kept.mass:.0%} of the teacher's probability on average; "
            "what is left out is spread evenly (raise teacher.top_k, or leave it out)"
        )
    return {
        "key": store.folder.name,
        "folder": str(store.folder),
        "items": [
            {"name": name, "shape": list(item.shape), "bytes": bytes_for({name: item}, finite_views(parts).count)}
            for name, item in items.items()
        ],
        "images": finite_views(parts).count,
        "computed": kept.computed,
        "bytes": store.nbytes,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _key(parts: RunComponents, prepared: PreparedTeacher) -> dict[str, Any]:
    """Everything besides the image and its draw that decides what is stored."""
    network, view = prepared.network, parts.views.view
    return CacheKey(
        teacher=network.identity.model,
        state=prepared.fingerprint,
        preprocessing=network.preprocess.to_dict(),
        view={**view.to_dict(), "augment": parts.recipe.data.augment},
        precision="bf16" if parts.bf16 else "fp32",
        versions=library_versions(),
    ).to_dict()
