"""``teacher.prepare: auto``: a few ways are tried on held-out training images, and the best prepares the teacher."""

import shutil
import statistics
from collections.abc import Generator, Mapping
from pathlib import Path

from remap.data.augmentation import Augmentation
from remap.data.balance import classes_only_in
from remap.data.splits import ImageData
from remap.distributed.launch import accelerator
from remap.io.human_size import duration, number_of
from remap.pipeline.nested_runs import open_or_create, require_unlinked
from remap.pipeline.teacher_run import TeacherRun
from remap.progress import Progress
from remap.recipe.schema import BASE_WIDTH, MethodSpec, Recipe, TrainSpec
from remap.recipe.sections import Fold
from remap.runs.run_dir import RunDir

# Share of the labelled training images that the ways are judged by.
HELD_OUT = 0.2
# Of fewer labelled images than this, each is judged by, in its turn: accuracy on a fifth of 100 images is known to 10
# points, and that on all of them to 5. Steps are few there too.
FEW, FOLDS = 200, 5
# Factor of the faster rate of ``full``: its default was chosen for students, which are not tuned to their limit.
FASTER = 5.0


def ways_to_prepare(tuning: Recipe) -> dict[str, Recipe]:
    """Return the recipes that are tried, by name; of equal ones the first is taken, so the cheapest come first.

    A head alone, fitted at once, leaves weights as they are that know these images already; tuning all of them at two
    rates is for images that they do not know.

    Args:
        tuning: That of the method ``full`` (``teacher_tuning.teacher_recipe``); a rate that it names is the only one.
    """
    ways = {"probe": _head_alone(tuning), "full": tuning}
    if tuning.train.lr is None:
        faster = {"base_lr": FASTER * tuning.learning_rate(BASE_WIDTH)}
        ways["full-fast"] = tuning.model_copy(update={"train": tuning.train.model_copy(update=faster)})
    return ways


def _head_alone(tuning: Recipe) -> Recipe:
    """Return the recipe that fits a head on the frozen network, which sees each image once and as it is."""
    # A section that is made anew leaves out all that steps and augmented images need.
    train = {name: getattr(tuning.train, name) for name in ("batch_size", "precision", "fused_attention", "processes")}
    plain = {"augment": "none", "views": None, "mixup": 0.0, "cutmix": 0.0, **dict.fromkeys(Augmentation.model_fields)}
    update = {
        "method": MethodSpec(name="linear"),
        "train": TrainSpec(fit="logistic", **train),
        "data": tuning.data.model_copy(update=plain),
    }
    return tuning.model_copy(update=update)


def judged_parts(tuning: Recipe, data: ImageData) -> int:
    """Return on how many parts of the labelled images each way is judged, each time learned from the others.

    0 where no way can be: a class would have no image left to learn from.
    """
    if tuning.data.held_out is not None:  # a trial of a run that is itself judged by held-out images
        return 1
    images = len(data.train)
    if not 0 < round((1.0 - HELD_OUT) * images) < images:
        return 0
    left = data.with_held_out(HELD_OUT)
    if classes_only_in([left.val], left.train, left):
        return 0
    return FOLDS if FOLDS <= images < FEW else 1


def best_way(
    tuning: Recipe, data: ImageData, folder: Path, title: str, progress: Progress
) -> Generator[TeacherRun, None, Recipe]:
    """Yield the trials that have not ended, which the caller runs at once.

    Args:
        data: The labelled training images.
        folder: Of the teacher; those of the trials lie beside it.

    Returns:
        The recipe of the best way, by all labelled images; of the first one where none can be judged.
    """
    ways, parts, accuracies = ways_to_prepare(tuning), judged_parts(tuning, data), dict[str, float]()
    images = number_of(len(data.train), "labelled image")
    if parts == 0:
        name, way = next(iter(ways.items()))
        progress.say(f"{title} is prepared by {name}: {images} of {len(data.classes)} classes are too few to judge by")
        return way
    by = f"by each fifth of the {images}" if parts > 1 else "by held-out training images"
    progress.say(f"{title} is prepared in {number_of(len(ways), 'way')}, judged {by}")
    for name, way in ways.items():
        found = []
        for part in range(1, parts + 1):
            which = name if parts == 1 else f"{name}-{part}"
            place = _beside(folder, which)
            require_unlinked(place)
            trial = _judged_by_held_out(way, part if parts > 1 else None)
            run_dir = open_or_create(place, trial)
            if not run_dir.is_done:
                yield TeacherRun(f"{title}, {which}", run_dir, trial, is_trial=True)
            summary = run_dir.summary()
            found.append(summary["student"]["accuracy"])
            progress.say(f"{title}, {which}: {found[-1]:.1%}, {duration(summary['seconds'])}")
            _remove_weights(run_dir)
        accuracies[name] = statistics.mean(found)
    best = max(accuracies, key=lambda name: accuracies[name])  # of equal ones the first
    progress.say(f"{title} is prepared by {best} (held-out training images: {_listed(accuracies)})")
    return ways[best]


def _remove_weights(trial: RunDir) -> None:
    """Remove what is as large as the teacher from a trial that has ended; its figures stay until the last one has."""
    if accelerator().is_main_process:
        for folder in (trial.task, trial.checkpoint):
            shutil.rmtree(folder, ignore_errors=True)


def remove_trials(folder: Path) -> None:
    """Remove the trials of a teacher that is prepared: their weights are as large as its own."""
    if accelerator().is_main_process:
        for place in folder.parent.glob(_beside(folder, "*").name):
            shutil.rmtree(place, ignore_errors=True)


def _beside(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}-trial-{name}")


def _judged_by_held_out(way: Recipe, fold: int | None) -> Recipe:
    """Return the recipe of a trial, which is judged by a share of the training images, or by one of the folds."""
    if fold is not None:
        held_out: dict[str, object] = {"fold": Fold(number=fold, of=FOLDS, judges=True)}
    else:  # a trial of a run that is itself judged by held-out images learns from as few, and is judged by the same
        held_out = {"held_out": way.data.held_out or HELD_OUT}
    data = way.data.model_copy(update={**held_out, "selection": None})
    # Judged once, after the last epoch, which is always evaluated.
    last = {"keep": "last", "metric": "accuracy", "patience": None, "eval_every": way.train.epochs}
    return way.model_copy(update={"data": data, "train": way.train.model_copy(update=last)})


def _listed(accuracies: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies.items())
