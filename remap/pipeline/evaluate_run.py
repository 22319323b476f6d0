"""Evaluate a finished run again, on its evaluation split or on other data."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from remap.data.fingerprint import Contents
from remap.data.image_files import Skipped, left_out
from remap.data.sources import read_all
from remap.data.splits import Split
from remap.data.views import ViewSource
from remap.distributed.collectives import share_unreadable
from remap.distributed.interrupts import watch_signals
from remap.distributed.launch import accelerator, use_bf16
from remap.distributed.reading import listing_together, load_together, share_digests
from remap.engine.evaluation_pass import batch_size_of_evaluation, evaluate
from remap.engine.metrics import metrics
from remap.errors import RunError
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.network import choose_kernels
from remap.pipeline.computed_once import measured
from remap.progress import Progress
from remap.recipe.schema import DataSpec
from remap.runs.answers import read_evidence
from remap.runs.run_dir import RunDir
from remap.runs.run_images import images_of_run
from remap.runs.task import load_task, require_classifier


def evaluate_run(path: Path, data: str | None, skip_bad: bool, progress: Progress) -> dict[str, Any]:
    """Return the accuracy of a run's student.

    Args:
        data: Another folder or tar with the same class names, all of it; None takes the run's evaluation split.

    Returns:
        accuracy, correct, images, interval (of the accuracy, 95 %), metrics (see ``remap.engine.metrics``), per class:
        name, images, accuracy; and how many files were left out for which reason. Where an image has any number of
        classes, accuracy is the mean average precision, and that of a class its own.
    """
    run = RunDir.open(path)
    recipe = run.recipe()
    network, view = load_task(run.path)
    require_classifier(network, run.path)
    device = accelerator().device
    network.model.to(device)
    bf16 = use_bf16(recipe.train.precision, device)
    # trains: a student keeps the kernel that it was trained with, also where it only answers.
    choose_kernels(network, recipe.train.fused_attention, device, bf16=bf16, trains=True)
    of_run = run.images(instead=", or name others with --data") if data is None else nullcontext()
    with of_run, listing_together(accelerator()):
        split, source, others = _split(recipe.data, data, network.classes or ())
    if others:
        progress.say(left_out(others))
    images = ViewSource(split, view, memory_bytes=recipe.data.memory_gib * 2**30, workers=recipe.data.workers)
    # Decoded once, so that unreadable files are known before the first batch.
    load_together(accelerator(), images, progress, "evaluation images")
    with watch_signals():
        found = evaluate(
            network,
            images,
            accelerator(),
            batch_size=batch_size_of_evaluation(recipe),
            bf16=bf16,
            progress=progress,
            what="the student" if data is None else f"the student on {Path(data).name}",
            skip_bad=skip_bad or recipe.data.skip_bad,
            images="evaluation" if data is None else Path(data).name,
        )
    # Each process read its share; the report lists all bad files.
    share_unreadable(accelerator(), images)
    if data is None:
        # A collective call: every process makes it, whether or not it has anything to say.
        share_digests(accelerator(), images.contents)  # each process has read its own share
        if accelerator().is_main_process:
            _say_if_others(run, images.contents, found.count, progress)
    elif accelerator().is_main_process:
        _say_if_learned_from(run, split, data, progress)
    classes = []
    for label, name in enumerate(network.classes or ()):
        count, share = found.of_class(label, split.labels)
        classes.append({"class": name, "images": count, "accuracy": share})
    return {
        "run_dir": str(run.path),
        "data": source,
        "metric": found.metric,
        "accuracy": found.merit,
        "correct": found.correct,
        "images": found.count,
        "interval": list(measured(found)[1:]),
        "metrics": metrics(found, split.labels),
        "left_out": dict(Counter(reason for _, reason in others)),
        "skipped": [list(item) for item in images.bad_names()],
        "classes": classes,
    }


def _say_if_others(run: RunDir, contents: Contents, count: int, progress: Progress) -> None:
    """Say where the images differ from those of the run, whose accuracy then does not compare."""
    try:
        noted = run.summary()["data"]
        then, wanted = noted["val_images"], noted["val_fingerprint"]
    except (RunError, KeyError, TypeError):  # evaluation needs no summary
        return
    if contents.fingerprint(progress, "evaluation images") != wanted:
        counts = f"{count} now, {then} then"
        progress.say(f"the evaluation images are not those of the run ({counts}): names, labels or contents differ")


def _say_if_learned_from(run: RunDir, split: Split, data: str, progress: Progress) -> None:
    """Say where images hold all evaluation images of the run and more, as the run's own folder in a new place does."""
    try:
        evidence = read_evidence(run.path)
    except RunError:  # evaluation needs none
        return
    names = {plain(name) for name in split.names}
    if evidence is not None and evidence.names and names > set(evidence.names):
        of_run, others = len(evidence.names), len(names) - len(evidence.names)
        progress.say(
            f"{plain(data)} holds {number_of(of_run, 'image')} with the names of the run's evaluation images, and"
            f" {number_of(others, 'other')}: if the run learned from those, this is not its accuracy on held-out images"
            f" (for that, write the path into {run.path / 'recipe.yaml'}, source under data, and leave --data out)"
        )


def _split(spec: DataSpec, data: str | None, classes: tuple[str, ...]) -> tuple[Split, str, Skipped]:
    if data is None and spec.source is None:  # of a student that learned without labels
        data = spec.val_source
        if data is None:
            raise RunError("the run has no evaluation images, no image has a label", do="name some: --data FOLDER")
    if data is None:
        opened = images_of_run(spec)
        return opened.val, opened.source, opened.skipped
    split, others = read_all(data, classes, spec.depth, spec.task)
    return split, data, others
