"""Teachers: load them, and give those a head for these classes that have none, by a linear probe or by tuning."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from remap.backbones.build import Backbone
from remap.distributed.launch import accelerator
from remap.engine.evaluation import Evaluation
from remap.engine.evaluation_pass import evaluate_as
from remap.engine.self_teachers import averaged_copy, untuned_copy
from remap.errors import RunError
from remap.io.paths import expanded
from remap.network import Network, tuned
from remap.pipeline.adjusting import adjust_logits
from remap.pipeline.class_matching import match_classes
from remap.pipeline.class_words import answers_of, write_words
from remap.pipeline.computed_once import evaluate_once, measured_once
from remap.pipeline.data_views import DataViews
from remap.pipeline.fit_head import LabeledFeatures, fit_head
from remap.pipeline.fold_teachers import prepare_folds
from remap.pipeline.one_pass import OnePass
from remap.pipeline.prepared_teacher import PreparedTeacher, placed, placed_network
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import data_of_teacher, is_prepared, needs_logits, title_of, tuned_key
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import AUTO, EMA, SELF, WORDS, Recipe, TeacherSpec
from remap.runs.task import load_task, open_backbone, put_task, require_as_run


def load_teacher(
    spec: TeacherSpec, recipe: Recipe, classes: tuple[str, ...], student: Backbone, progress: Progress
) -> PreparedTeacher:
    """Load a teacher from its source; a run directory with the same classes brings its head.

    Args:
        student: The student's backbone before a method is attached to it, for the teacher "self". 'self' shares the
            student's tensors and is moved to the device together with it.
    """
    if spec.model == SELF:
        network = untuned_copy(student, classes)
        network.task = recipe.data.task
        return PreparedTeacher(network, spec, _key(network, "none", spec, recipe), "none")
    if is_run(spec.model):
        require_as_run(spec)
        network, _ = load_task(expanded(spec.model))
        known = network.classes or ()
        # One that knows the first classes only teaches those (``LogitsTerm``).
        brings_head = known == classes or (spec.prepare == "none" and known and known == classes[: len(known)])
        if brings_head and network.task != recipe.data.task:
            tasks = f"task {network.task}, and this recipe is of task {recipe.data.task}"
            raise RunError(
                f"the run {spec.model} was tuned for {tasks}",
                do="name a run of the same task, or the model that was tuned",
            )
        if brings_head:
            key = _key(network, "its own", spec, recipe)
            return placed(PreparedTeacher(network, spec, key, "its own"), recipe)
    # A fresh head is drawn here; the generator is forked by the caller.
    torch.manual_seed(recipe.seed)
    # With prepare=none the user vouches for the model's head.
    keep_head = spec.prepare == "none" and needs_logits(recipe)
    backbone = open_backbone(spec, len(classes), keep_head=keep_head)
    for note in backbone.notes:
        progress.say(f"{title_of(spec, recipe)}: {note}")
    if keep_head:
        progress.say(match_classes(backbone, classes, spec.classes))
    by_words = spec.prepare == WORDS and needs_logits(recipe) and write_words(backbone, recipe.data, classes, progress)
    network = tuned(backbone, "linear", {})
    network.classes, network.task = classes, recipe.data.task
    if not needs_logits(recipe):  # an unread head: zero for every seed, so that cached outputs are found again
        with torch.no_grad():
            for parameter in network.head.values():
                parameter.zero_()
    head = "its own" if keep_head else WORDS if by_words else "none"
    return placed(PreparedTeacher(network, spec, _key(network, head, spec, recipe), head), recipe)


def averaging_teacher(spec: TeacherSpec, student: Network) -> PreparedTeacher:
    """Return the moving average of the student, at its start."""
    return PreparedTeacher(averaged_copy(student), spec, EMA, "the student's")


def prepare_teacher(
    teacher: PreparedTeacher,
    recipe: Recipe,
    folder: Path,
    views: DataViews,
    progress: Progress,
    shared: SharedResources,
    run_once: Callable[[], OnePass | None],
) -> PreparedTeacher:
    """Give a teacher whose logits a loss reads a head for these classes, if it has none; then evaluate it.

    Args:
        folder: Where the fitted head is stored as a task, and the accuracy, so that a resumed run finds them.
        run_once: Runs it over the training images, where its outputs are cached and one pass serves for the head too.
    """
    spec, part = teacher.spec, views
    knows_all = teacher.head == "none" or teacher.network.classes == views.data.classes
    if not needs_logits(recipe) or spec.model == EMA or not knows_all:  # which cannot be judged by these images
        return teacher
    if shared.teacher_folder is not None:  # one teacher for all runs of a comparison, for every seed
        teacher = replace(teacher, key=f"shared {spec.model_dump(mode='json')}")
    reusable = spec.model != SELF  # which shares the tensors of one student
    if reusable and teacher.key in shared.teachers:
        return shared.teachers[teacher.key]
    if spec.calibrate:
        part = shared.open(data_of_teacher(recipe, spec, 0), views.view, progress)
    if teacher.head == "none":
        teacher = _with_head(teacher, recipe, folder, views, part, progress, shared, run_once)
    source = views.train if views.unlabeled is None else views.unlabeled
    title, batch_size = title_of(spec, recipe), recipe.train.batch_size
    logits_NC = adjust_logits(teacher.network, spec, title, source, part.val, batch_size, progress)
    if teacher.head == WORDS and views.unlabeled is not None:
        answers = answers_of(teacher.network, views.unlabeled, recipe.train.batch_size, progress, logits_NC)
        teacher = replace(teacher, answers=answers)
    of = f"{views.digest(progress)} {views.view} {recipe.data.skip_bad} {recipe.train.precision} {teacher.fingerprint}"
    network = teacher.network

    found: list[Evaluation] = []
    evaluate = partial(evaluate_as, recipe, network, views.val, progress, "the teacher")

    def evaluated() -> Evaluation:
        found.append(evaluate_once(recipe, network, views, evaluate))
        return found[0]

    # Judged once; the check against chance and the summary both use it.
    accuracy = measured_once(folder, "the teacher", of, evaluated) if len(views.val.split) else None
    teacher = replace(teacher, accuracy=accuracy, evaluation=found[0] if found else None)
    if reusable:
        shared.teachers[teacher.key] = teacher
    return teacher


def _with_head(
    teacher: PreparedTeacher,
    recipe: Recipe,
    folder: Path,
    views: DataViews,
    part: DataViews,
    progress: Progress,
    shared: SharedResources,
    run_once: Callable[[], OnePass | None],
) -> PreparedTeacher:
    """Return the teacher with a fitted head, or as it was tuned; and with those of its folds.

    Args:
        part: The images that a head is fitted on: ``views``, or less those held out for its temperature.
    """
    spec, network = teacher.spec, teacher.network
    features = LabeledFeatures(network, recipe, part, progress, run_once)
    if spec.prepare == "probe":
        if not is_prepared(folder):
            fit_head(network, spec, recipe, folder, part, progress, shared, features)
        # The main process makes the folder; the others must not look for it earlier.
        accelerator().wait_for_everyone()
        # Read back from the file by every process, also by the one that fitted it: all have the same bits.
        put_task(network, folder)
    else:
        network, _ = load_task(shared.tuned_teachers[tuned_key(recipe, spec)])
    head = "+".join(network.attached.methods) if spec.prepare == AUTO else spec.prepare
    teacher = placed(replace(teacher, network=network, head=head), recipe)
    if spec.folds:
        if part is not views:
            features = LabeledFeatures(network, recipe, views, progress, run_once)
        place = partial(placed_network, teacher, recipe)
        own = prepare_folds(network, spec, recipe, folder, views, progress, shared, features, place)
        teacher = replace(teacher, folds=own)
    return replace(teacher, one_pass=features.once)


def _key(network: Network, head: str, spec: TeacherSpec, recipe: Recipe) -> str:
    """Return backbone, origin of the head, and all that decides how it is fitted."""
    adjusted = f"{spec.calibrate} {spec.balance} {spec.soften}"
    return "|".join(
        [
            network.identity.sha256,
            head,
            f"{spec.model} {spec.weights} {spec.image_size} {spec.classes} {adjusted}"
            if head == "its own"
            else str(spec.model_dump(mode="json", exclude={"weight", "cache", "cache_dtype", "shard"})),
            str(recipe.data.model_dump(mode="json")),
            str(recipe.seed) if spec.prepare not in ("probe", "none") else "",
        ]
    )
