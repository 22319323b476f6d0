"""Give a teacher a linear head for these classes: read from the cache, or fitted on its features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from remap.distributed.launch import accelerator, use_bf16
from remap.io.versions import version_of
from remap.network import Network
from remap.pipeline import probe
from remap.pipeline.data_views import DataViews
from remap.pipeline.judged import digest_of_network
from remap.pipeline.one_pass import OnePass
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import PROBE, StoredTeacher, require_unlinked, title_of
from remap.progress import Progress
from remap.recipe.schema import Recipe, TeacherSpec
from remap.runs.task import save_task, task_tensors


def fit_head(
    network: Network,
    spec: TeacherSpec,
    recipe: Recipe,
    folder: Path,
    views: DataViews,
    progress: Progress,
    shared: SharedResources,
    run_once: Callable[[], OnePass | None],
) -> OnePass | None:
    """Store a teacher with its head as a task, and in the cache for later runs.

    Args:
        folder: Where the task is stored.
        views: The images it is fitted on.
        run_once: Runs the teacher over the training images, where its outputs are cached and one pass serves for both.

    Returns:
        That pass; None where there was none.
    """
    bf16 = use_bf16(recipe.train.precision, accelerator().device)
    # The pass of a training step in one process, for any number of them.
    batch = max(1, min(recipe.train.batch_size, len(views.training_source.split)) // recipe.train.accumulation)
    require_unlinked(folder)

    # A function, since hashes are computed only where the cache is used (``StoredTeacher.made_by``).
    def key() -> dict[str, Any]:
        return {
            "teacher": network.identity.model,
            "method": PROBE,
            # Without what is fitted, which the seed draws.
            "network": digest_of_network(network, without=probe.fitted_tensors(network)),
            "classes": list(network.classes or ()),
            "images": views.train.contents.fingerprint(progress, "training images"),
            "batch": batch,
            "view": views.view.to_dict(),
            "precision": "bf16" if bf16 else "fp32",
            "attention": recipe.train.fused_attention,
            "scikit-learn": version_of("scikit-learn"),  # another version of its solver ends at other bits
        }

    stored = StoredTeacher.made_by(key, {"training": views.train.contents}, spec, shared, progress)
    if stored.fetch(folder):
        return None
    title, classes = title_of(spec, recipe), len(views.data.classes)
    progress.say(f"{title} has no head for these {classes} classes: fitting one")
    once = run_once()
    features = once.features(views) if once is not None else None
    strength = probe.fit_probe(network, views.train, accelerator(), batch, progress, bf16=bf16, features=features)
    # In every process: tensors of a sharded network are gathered from all of them.
    tensors = task_tensors(network)
    if accelerator().is_main_process:
        save_task(folder / "task", network, views.view, "linear", {}, tensors)
        stored.store(folder)
    progress.say(f"fitted by logistic regression on the teacher's features (C = {strength})")
    return once
