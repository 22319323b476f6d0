"""Adapt a finished run to another domain by images of it without labels, and without the images it learned from.

Letters: N images of the domain, C classes, D width of the pooled features.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, get_args

from remap.data.fingerprint import Contents
from remap.data.image_files import Skipped, left_out
from remap.data.sources import open_unlabeled, read_all
from remap.data.views import View, ViewSource, listed
from remap.distributed.launch import accelerator, require_one_process, use_bf16
from remap.engine.evaluation import Evaluation
from remap.engine.evaluation_pass import evaluate_as
from remap.engine.metrics import metrics
from remap.errors import DataError, RecipeError
from remap.io.human_size import number_of
from remap.io.paths import absolute, expanded
from remap.network import Network, choose_kernels
from remap.pipeline.run_path import run_path
from remap.pipeline.shared import SharedResources
from remap.pipeline.source_free import by_information, by_statistics
from remap.progress import Progress, Silent
from remap.recipe import Recipe
from remap.recipe.problems import checked
from remap.recipe.schema import TrainSpec
from remap.runs.hardware import machine
from remap.runs.run_dir import RunDir, default_path
from remap.runs.task import load_task, require_classifier, save_task
from remap.runs.task_file import folder_of, read_meta

By = Literal["shot", "statistics"]
# Of the run's learning rate: its parameters are near their place already.
RATE = 0.1
EPOCHS = 15


def adapt(
    run: str | Path,
    target: str,
    *,
    by: By = "shot",
    epochs: int | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    seed: int | None = None,
    val_data: str | None = None,
    output: str | Path | None = None,
    progress: Progress = Silent(),
) -> dict[str, Any]:
    """Adapt a run's student to images of another domain; the result is a new run directory, the run stays as it is.

    "shot" (Liang et al. 2020, arXiv 2002.08546) trains what the method tuned and keeps the classifier: confident
    outputs over all classes (Eq. 2), and pseudo-labels by centroids, computed anew in each epoch. "statistics"
    (Li et al. 2016, AdaBN, arXiv 1603.04779) trains nothing: the batch norms get the means and variances of these
    images.

    Args:
        run: The run directory.
        target: Folder or archive of images without labels.
        epochs, lr, seed: Of the training by "shot"; epochs None is 15, lr None a tenth of the run's, seed None 0.
        batch_size: Images of one pass.
        val_data: Labelled images of the other domain, to measure the gain; nothing is chosen by them.
        output: The run directory to make; by default the next number under ``runs/``.

    Returns:
        The summary of the new run.

    Raises:
        RunError: The run is not finished, or its method leaves nothing to adapt.
        DataError: There is no image, or the images are those that the run learned from.
    """
    require_one_process("a run is adapted in one process", "call it without a launcher")
    if by not in get_args(By):
        raise RecipeError([f"by: '{by}' is not a way to adapt (allowed: {', '.join(get_args(By))})"], "remap.adapt")
    if by == "statistics" and not (epochs is lr is seed is None):
        raise RecipeError(
            ["by: statistics takes no steps and draws nothing (leave epochs, lr and seed out)"], "remap.adapt"
        )
    # Only here: up to this line None says that no seed was given.
    seed = checked(Recipe, {"seed": seed or 0}, "remap.adapt").seed
    began, old = time.perf_counter(), RunDir.open(expanded(run))
    recipe = old.recipe()
    known = recipe.data.source
    # Links and relative paths are followed: one folder can be named in several ways.
    if known is not None and expanded(target).resolve() == expanded(known).resolve():
        raise DataError("the run learned from these images", given=target, do="name images of another domain")
    if output is not None:
        RunDir(expanded(output)).require_free()  # refused now, not once everything is computed
    network, view = load_task(old.path)
    require_classifier(network, old.path)
    network.require_one_class("adapting to another domain")
    network.model.to(accelerator().device)
    bf16 = use_bf16(recipe.train.precision, accelerator().device)
    choose_kernels(network, recipe.train.fused_attention, accelerator().device, bf16=bf16)
    rate = RATE * recipe.learning_rate(network.anatomy.width) if lr is None else lr
    options = {"epochs": EPOCHS if epochs is None else epochs, "batch_size": batch_size, "lr": rate}
    options |= {name: getattr(recipe.train, name) for name in ("optimizer", "precision")}  # the rate is for that one
    # Values of a caller, checked as those of a recipe are.
    spec = checked(TrainSpec, options, "remap.adapt")
    # Pixels are augmented as in the run; its other data options name images that are not here.
    data = recipe.data.labeled_part().model_copy(update={"mixup": 0.0, "cutmix": 0.0, "views": None})
    settings = recipe.model_copy(update={"seed": seed, "train": spec, "data": data, "teachers": ()})

    source, skipped = _opened(target, view, settings, progress)
    if known is not None and expanded(known).resolve() in expanded(target).resolve().parents:
        _require_other_images(source, recipe, target, progress)
    judged = None
    if val_data is not None:
        labeled, _ = read_all(val_data, network.classes or (), recipe.data.depth)
        judged = ViewSource(labeled, view, memory_bytes=0.0)

    def evaluation(what: str) -> Evaluation | None:
        if judged is None:
            return None
        return evaluate_as(settings, network, judged, progress, what)

    # Before anything else: both ways change the network in place.
    before = evaluation("the run")
    if by == "shot":
        found = by_information(network, source, settings, old.path, progress)
    else:
        found = by_statistics(network, source, batch_size, old.path, progress)
    after = evaluation("the result")
    summary: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": seed,
        "method": recipe.method.name,
        "device": str(accelerator().device),
        "data": {
            "source": target,
            "classes": len(network.classes or ()),
            "train_images": len(source.split),
            "labeled_images": 0,
            "val_images": 0 if judged is None else len(judged.split),
            "skipped": [list(item) for item in (*skipped, *source.bad_names())],
        },
        "student": {
            "model": network.identity.model,
            "backbone_sha256": network.identity.sha256,
            "accuracy": after and after.accuracy,
            "correct": after and after.correct,
            "initial_accuracy": before and before.accuracy,
            "metrics": metrics(after, judged.split.labels) if after is not None and judged is not None else {},
            "total_parameters": network.num_parameters,
        },
        "adapted": {"run": str(old.path), "by": by, "target": target},
    }
    # Epochs belong into metrics.jsonl, and the count to the figures of the student.
    history = found.pop("history")
    summary["student"]["trainable_parameters"] = found.pop("trainable_parameters")
    summary |= found
    with run_path(output, default_path(), f"{Path(absolute(old.path)).name}-adapted") as path:
        summary = {"run_dir": str(path), **summary}
        _write(path, recipe, network, view, read_meta(folder_of(old.path)).method.options, summary, history, began)
    return summary


def _require_other_images(source: ViewSource, recipe: Recipe, target: str, progress: Progress) -> None:
    """Refuse a folder inside that of the run whose images are all learned from, as its ``train`` is.

    Raises:
        DataError: They are.
    """
    learned = Contents(SharedResources().index(recipe.data).train, recipe.data.workers)
    both = {"images of the other domain": source.contents, "training images": learned}
    here, there = (set(map(bytes, one.complete(progress, what))) for what, one in both.items())
    if here <= there:
        raise DataError("the run learned from these images", given=target, do="name images of another domain")


def _opened(target: str, view: View, recipe: Recipe, progress: Progress) -> tuple[ViewSource, Skipped]:
    """Return the readable images of the other domain, with room for their pseudo-labels, and the files left out."""
    split, others = open_unlabeled(target)
    source = ViewSource(split, view, memory_bytes=recipe.data.memory_gib * 2**30, workers=recipe.data.workers)
    # Decoded before the first step, so that files that cannot be read are named and left out at once.
    source.load(progress, "images of the other domain")
    bad = source.bad_names()
    if bad:
        progress.say(f"left out {number_of(len(bad), 'image')} that cannot be read: {listed(bad)}")
    source = source.without_bad()
    if not len(source.split):
        raise DataError("no image of the other domain can be read", given=target, do="check the files")
    if others:
        progress.say(left_out(others))
    return source, (*others, *bad)


def _write(
    path: Path,
    recipe: Recipe,
    network: Network,
    view: View,
    options: dict[str, Any],
    summary: dict[str, Any],
    history: list[dict[str, Any]],
    began: float,
) -> None:
    """Write the run directory whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A draft in the same file system: one rename then makes the complete run appear.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".adapting-") as folder:
        draft = RunDir.create(Path(folder) / "run", recipe)
        draft.note_machine(machine(), resuming=False)
        draft.write_metrics(history)
        summary["student"]["task_bytes"] = save_task(draft.task, network, view, recipe.method.name, options)
        summary["seconds"] = round(time.perf_counter() - began, 2)
        draft.write_summary(summary)
        draft.set_status("done", seconds=summary["seconds"])
        os.rename(draft.path, path)
