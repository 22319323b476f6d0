"""Teachers that are tuned before the run: which, by what recipe, and where they are stored."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remap.data.stratify import folds
from remap.distributed.collectives import all_reduce_max
from remap.distributed.launch import accelerator
from remap.errors import DataError, RunError
from remap.io.human_size import number_of
from remap.io.paths import expanded
from remap.pipeline.nested_runs import open_or_create, require_unlinked
from remap.pipeline.preparation_trials import best_way, remove_trials
from remap.pipeline.shared import SharedResources
from remap.pipeline.stored_teacher import StoredTeacher
from remap.pipeline.teacher_run import TeacherRun
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import AUTO, EMA, SELF, WORDS, DataSpec, LossSpec, MethodSpec, Recipe, StudentSpec, TeacherSpec
from remap.recipe.sections import Fold
from remap.remapping import LOSSES
from remap.runs.run_dir import RunDir
from remap.runs.task_file import folder_of, read_meta

# Share of the labelled training images that a teacher's temperature is fitted on.
HELD_OUT = 0.2


def teachers_to_tune(
    recipe: Recipe, run_dir: RunDir, progress: Progress, shared: SharedResources
) -> Iterator[TeacherRun]:
    """Yield what has to be tuned before this run, teachers and their trials.

    The caller runs each recipe before it asks for the next one.
    """
    require_folds(recipe, shared)
    require_unjudged(recipe, shared)
    # Numbers count without a running average, which is never stored.
    for number, spec in enumerate(spec for spec in recipe.teachers if spec.model != EMA):
        if spec.prepare in ("probe", "none", WORDS) or not needs_logits(recipe) or _brings_head(spec, recipe, shared):
            continue
        # 0 is the teacher of all labels; the others are each tuned without one fold.
        for fold in range((spec.folds or 0) + 1):
            tuning = teacher_recipe(recipe, spec, fold)
            folder = fold_folder(teacher_folder(spec, number, run_dir, shared), fold)
            key, title = tuned_key(recipe, spec, fold), title_of(spec, recipe, fold)
            # Tuned by an earlier run of this command, or by this run before it was interrupted.
            if key not in shared.tuned_teachers and not is_prepared(folder):
                require_unlinked(folder)
                stored = StoredTeacher.of(tuning, spec, shared, progress)
                if not stored.fetch(folder, title):
                    classes = len(shared.classes(recipe))
                    progress.say(f"{title} has no head for these {classes} classes: tuning it ({spec.prepare})")
                    if spec.prepare == AUTO:
                        tuning = yield from best_way(tuning, shared.index(tuning.data), folder, title, progress)
                    yield TeacherRun(title, open_or_create(folder, tuning), tuning)
                    if spec.prepare == AUTO:
                        remove_trials(folder)
                    # A run that was resumed may have begun on another machine, whose bits differ.
                    if stored.key is not None and not RunDir(folder).environment().get("resumed"):
                        stored.store(folder)
            shared.tuned_teachers.setdefault(key, folder)


def _brings_head(spec: TeacherSpec, recipe: Recipe, shared: SharedResources) -> bool:
    """Whether it is a run on the same classes, whose head serves."""
    # By names and order: a head for other classes is of no use.
    return is_run(spec.model) and read_meta(folder_of(expanded(spec.model))).classes == shared.classes(recipe)


def is_prepared(folder: Path) -> bool:
    """Return whether a teacher is stored there, fitted or tuned; every process calls it."""
    # As the main process sees it: it copies teachers out of the cache, and the others may look after that.
    here = accelerator().is_main_process and (folder / "task" / "task.json").is_file()
    return bool(all_reduce_max(accelerator(), here)[0])


def teacher_folder(spec: TeacherSpec, number: int, run_dir: RunDir, shared: SharedResources) -> Path:
    """Return where a prepared teacher is stored: teacher, teacher-2, ... of the run, or of its comparison.

    "self" always belongs to the run: it shares the weights of one student, which may be random.
    """
    in_run = shared.teacher_folder is None or spec.model == SELF
    first = run_dir.teacher if in_run else shared.teacher_folder
    assert first is not None
    return first if number == 0 else first.with_name(f"{first.name}-{number + 1}")


def require_folds(recipe: Recipe, shared: SharedResources) -> None:
    """Refuse folds of a teacher that brings its head, and of labelled images that are too few.

    Raises:
        RunError: It is a run on the same classes.
        DataError: There are fewer images than folds, or a class is in one fold alone.
    """
    for spec in recipe.teachers:
        if spec.folds is None:
            continue
        if _brings_head(spec, recipe, shared):
            raise RunError(
                f"the run {spec.model} brings its head, and has seen the images of every fold",
                do="leave teacher.folds out, or name the model that was tuned",
            )
        data = shared.index(recipe.data)
        if len(data.train) < spec.folds:
            given = f"{number_of(len(data.train), 'labelled image')}, teacher.folds={spec.folds}"
            raise DataError("there are fewer labelled images than folds", given=given)
        labels, what = data.train.labels, "a class of one labelled image"
        if labels.ndim == 2:  # images are divided by their rarest class, which may take all of another one along
            what = "a class whose labelled images are all in one fold"
        require_several_folds(data.classes, labels, folds(labels, spec.folds), what)


def require_unjudged(recipe: Recipe, shared: SharedResources) -> None:
    """Refuse what follows from a teacher's accuracy, where it is a run that knows the first of the classes alone.

    Raises:
        RunError: The recipe asks for that.
    """
    for spec in recipe.teachers:
        judged = {"calibrate": spec.calibrate, "balance": spec.balance, "overtaken": spec.overtaken == "fade"}
        given = [f"teacher.{name}" for name, on in judged.items() if on]
        if not given or not is_run(spec.model) or spec.prepare != "none":
            continue
        classes, known = shared.classes(recipe), read_meta(folder_of(expanded(spec.model))).classes
        if len(known) < len(classes) and known == classes[: len(known)]:
            raise RunError(
                f"the teacher {spec.model} knows {len(known)} of the {len(classes)} classes, and is not judged by these"
                " images",
                given=", ".join(given),
                do="leave it out, or take a teacher that knows all classes",
            )


def require_several_folds(classes: Sequence[str], labels: NDArray[Any], fold_N: NDArray[np.int64], what: str) -> None:
    """Refuse a class whose images are all in one fold: the teacher that answers them would not know it.

    Args:
        labels: Of some images, (N,), or (N, C) where an image has several.
        what: What such a class is, for the message.

    Raises:
        DataError: There is one.
    """
    parts = [labels[fold_N == fold] for fold in np.unique(fold_N)]
    has_KC = [
        (part == 1).any(axis=0) if part.ndim == 2 else np.bincount(part, minlength=len(classes)) > 0 for part in parts
    ]
    alone = [classes[label] for label in np.flatnonzero(np.sum(has_KC, axis=0) == 1).tolist()]
    if alone:
        raise DataError(
            f"{what} would be answered by a teacher that does not know it",
            given=", ".join(alone[:10]),
            do="label another image of each class, or leave teacher.folds out",
        )


def fold_folder(folder: Path, fold: int) -> Path:
    """Return where the teacher that was prepared without a fold is stored, beside that of all labels (fold 0)."""
    return folder.with_name(f"{folder.name}-fold-{fold}") if fold else folder


def title_of(spec: TeacherSpec, recipe: Recipe, fold: int = 0) -> str:
    """Return how messages call a teacher."""
    title = f"the teacher {spec.model}" if len(recipe.teachers) > 1 else "the teacher"
    return f"{title} without fold {fold} of {spec.folds}" if fold else title


def data_of_teacher(recipe: Recipe, spec: TeacherSpec, fold: int) -> DataSpec:
    """Return the labelled images that a teacher is prepared on, without a fold (0 is none), in the run's views."""
    data, share = recipe.data.labeled_part(), HELD_OUT if spec.calibrate else None
    if fold:  # held out of the other folds, so that no image of this one counts
        assert spec.folds is not None
        return data.model_copy(update={"fold": Fold(number=fold, of=spec.folds, held_out=share)})
    if share is not None and data.selection is not None:  # ``held_out`` would take the images that judge the student
        return data.model_copy(update={"fold": Fold(number=1, of=round(1 / share), judges=True)})
    return data if share is None else data.model_copy(update={"held_out": share})


def teacher_recipe(recipe: Recipe, spec: TeacherSpec, fold: int = 0) -> Recipe:
    """Return the recipe that tunes a teacher: the run's labelled images and loop, its method, cross-entropy.

    Args:
        fold: Which fold of the images it is tuned without; 0 is none.

    Returns:
        With ``prepare: auto`` that of ``full``, from which the ways are made (``preparation_trials``).
    """
    # The teacher's rate, from warm-up to end, belongs to its method, not to the student's.
    own = {"lr": spec.lr, "base_lr": None, "min_lr": 0.0, "warmup_epochs": None, "optimizer": "adamw", "track": ()}
    own |= {"checkpoint_blocks": False}  # which its blocks may not allow, and only the student's memory asks for
    epochs = spec.epochs or recipe.train.epochs
    if not recipe.train.selects:  # evaluated as many times as its student: the figures between serve the eye alone
        own["eval_every"] = -(-recipe.train.eval_every * epochs // recipe.train.epochs)
    train = recipe.train.model_copy(update={"epochs": epochs, **own})
    shared = ("model", "weights", "preset", "image_size")
    return recipe.model_copy(
        update={
            "name": f"{recipe.name[:56]}-teacher",
            # It is tuned on labelled images as they are: mixed or unlabelled ones are for the student.
            "data": data_of_teacher(recipe, spec, fold).model_copy(update={"views": None, "mixup": 0.0, "cutmix": 0.0}),
            "baseline": False,
            "choose_losses": False,
            "teachers": (),
            "student": StudentSpec(**{name: getattr(spec, name) for name in shared}),
            "method": MethodSpec(name="full" if spec.prepare == AUTO else spec.prepare),
            "losses": (LossSpec(name="ce", weight=LOSSES.row("ce").weight),),
            "train": train,
        }
    )


def tuned_key(recipe: Recipe, spec: TeacherSpec, fold: int = 0) -> str:
    """Return the key of a tuned teacher in ``SharedResources.tuned_teachers``."""
    digest = teacher_recipe(recipe, spec, fold).digest()
    return f"{AUTO} {digest}" if spec.prepare == AUTO else digest


def lend_teachers(recipe: Recipe, trial: Recipe, shared: SharedResources) -> None:
    """Let a trial of a run, which has images and epochs of its own, learn from the teachers tuned for the run."""
    for spec in recipe.teachers:
        # No folder of a run that brings its head.
        if spec.prepare not in ("probe", "none") and (folder := shared.tuned_teachers.get(tuned_key(recipe, spec))):
            shared.tuned_teachers[tuned_key(trial, spec)] = folder


def needs_logits(recipe: Recipe) -> bool:
    """Return whether a loss reads the teacher's logits, so that it needs a head."""
    return any(loss.reads_logits for loss in recipe.losses)
