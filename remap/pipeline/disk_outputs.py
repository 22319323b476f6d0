"""Teacher outputs on disk: compute the rows that a store lacks, and say what that takes."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from remap.cache.cache_folders import CacheKey, cache_root, library_versions, require_space
from remap.cache.output_format import OutputFormat
from remap.cache.output_store import LEAST_MASS, OutputStore, bytes_for
from remap.cache.passes import outputs_of
from remap.cache.teacher_cache import FiniteViews, OnDisk, OnDiskByFold, cache_on_disk, missing_rows
from remap.data.images import ALWAYS_OPAQUE
from remap.distributed.launch import accelerator
from remap.engine.teacher import Teacher
from remap.io.human_size import duration, number_of, size
from remap.pipeline.components import RunComponents
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.pipeline.teacher_shares import Share, fold_of_images, known_outputs, shares
from remap.progress import Progress
from remap.recipe.schema import TeacherSpec
from remap.remapping.targets import LOGITS


def items_on_disk(spec: TeacherSpec, shapes: Mapping[str, tuple[int, ...]], *, bf16: bool) -> dict[str, OutputFormat]:
    """Return how each output is stored on disk."""
    dtype = ("fp16" if bf16 else "fp32") if spec.cache_dtype == "auto" else spec.cache_dtype
    return {name: OutputFormat(shape, dtype, spec.top_k if name == LOGITS else None) for name, shape in shapes.items()}


def store_on_disk(
    components: RunComponents,
    teacher: Teacher,
    prepared: PreparedTeacher,
    shapes: Mapping[str, tuple[int, ...]],
    progress: Progress,
    *,
    timed: bool = False,
) -> list[dict[str, Any]]:
    """Compute the rows that the store lacks, give the store to the teacher, and return what was done.

    Args:
        shapes: Shape of one image's row of each output.
        timed: Say beforehand how long it takes; two batches are computed to know.

    Returns:
        An entry; with ``teacher.folds`` one for each store, since each teacher has its own.
    """
    stores, reports = dict[int, OnDisk](), []
    for share in shares(components, teacher, prepared, progress):
        stores[share.fold], report = _store_share(components, share, prepared, shapes, progress, timed)
        reports.append({**report, "fold": share.fold} if prepared.folds is not None else report)
    fold_N = fold_of_images(components, prepared)
    teacher.cached = OnDiskByFold(fold_N, stores) if len(stores) > 1 else stores.popitem()[1]
    return reports


def _store_share(
    components: RunComponents,
    share: Share,
    prepared: PreparedTeacher,
    shapes: Mapping[str, tuple[int, ...]],
    progress: Progress,
    timed: bool,
) -> tuple[OnDisk, dict[str, Any]]:
    views, teacher, batch = share.views, share.teacher, components.process_images
    items = items_on_disk(prepared.spec, shapes, bf16=components.bf16)
    store = OutputStore.open(cache_root(), key_on_disk(components, prepared, share.fingerprint), items)
    started, missing = time.perf_counter(), missing_rows(store, views, batch)
    if missing:
        cost = size(bytes_for(items, missing))
        if timed:
            batches = missing / batch / accelerator().num_processes
            cost += f", about {duration(batches * _batch_seconds(teacher, views, batch, components.pass_images))}"
        progress.say(
            f"caching teacher outputs on disk: {number_of(len(views.indices), 'image')} x"
            f" {number_of(views.views, 'view')}, "
            f"{missing:,} of {views.count:,} to compute, {cost}"
        )
    # Only what is missing has to fit.
    require_space(cache_root(), bytes_for(items, missing))
    known = known_outputs(components, prepared, set(shapes), views) if missing else None
    cached = cache_on_disk(teacher, store, views, batch, components.pass_images, accelerator(), progress, known)
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
    return cached, {
        "key": store.folder.name,
        "folder": str(store.folder),
        "items": [{"name": n, "shape": list(form.shape), "bytes": sizes[n]} for n, form in items.items()],
        "images": views.count,  # rows: each view of an image counts
        "views": views.views,
        "computed": cached.computed,
        "bytes": store.nbytes,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _batch_seconds(teacher: Teacher, views: FiniteViews, batch: int, at_once: int) -> float:
    """Return how long a batch takes, from files to outputs; that of the second one, since the first warms up."""
    indices, started = views.indices[:batch], 0.0
    for _ in range(2):
        started = time.perf_counter()
        for value in outputs_of(teacher, views.images(0, indices)[0], batch, at_once).values():
            value.cpu()  # waits for a GPU
    return time.perf_counter() - started


def key_on_disk(components: RunComponents, prepared: PreparedTeacher, fingerprint: str) -> dict[str, Any]:
    """Return everything besides the image and its draw that decides what is stored."""
    network, view = prepared.network, components.views.view
    if all(name.lower().endswith(ALWAYS_OPAQUE) for name in components.training_source.split.names):
        view = replace(view, pixels=replace(view.pixels, alpha="drop"))  # what earlier versions cached is right
    return CacheKey(
        teacher=network.identity.model,
        state=fingerprint,
        preprocessing=network.preprocess.to_dict(),
        view={**view.to_dict(), "augment": components.recipe.data.augmentation.key()},
        precision="bf16" if components.bf16 else "fp32",
        versions=library_versions(),
    ).to_dict()
