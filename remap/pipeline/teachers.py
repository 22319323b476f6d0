"""Teachers: load them, and give those a head for these classes that have none, by a linear probe or by tuning."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remap.backbones.build import Backbone
from remap.distributed.launch import accelerator, use_bf16
from remap.distributed.sharding import is_sharded, shard, wants_sharding
from remap.engine.evaluate import evaluate_as
from remap.engine.evaluation import Evaluation
from remap.engine.self_teachers import averaged_copy, untuned_copy
from remap.errors import RunError
from remap.io.paths import expanded
from remap.network import Network, choose_attention, tuned
from remap.pipeline.balancing import balance
from remap.pipeline.calibration import calibrate
from remap.pipeline.class_matching import match_classes
from remap.pipeline.class_words import Answers, answers_of, write_words
from remap.pipeline.data_views import DataViews
from remap.pipeline.fit_head import fit_head
from remap.pipeline.judged import digest_of_network, evaluate_once, measured_once
from remap.pipeline.one_pass import OnePass
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import (
    HELD_OUT,
    is_prepared,
    needs_logits,
    teacher_recipe,
    title_of,
)
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import EMA, SELF, WORDS, Recipe, TeacherSpec
from remap.runs.interval import Measured
from remap.runs.task import load_task, open_backbone, put_task, require_size_of_run


@dataclass
class PreparedTeacher:
    """A teacher and what is known of it.

    Attributes:
        key: Equal for teachers that are prepared in the same way.
        head: Where its classifier comes from: "its own", "probe", "words", a method's name, or "none".
        accuracy: On the evaluation split; None when no loss reads its logits, or no image has a label.
        outputs: Where they came from in training: "each step", "memory" or "disk".
        evaluation: What ``accuracy`` was counted from.
        one_pass: What it made of the training images before it had a head, until the first run has taken it.
        answers: How sure it is, class by class, on images without labels; None where its classifier is not of words.
    """

    network: Network
    spec: TeacherSpec
    key: str
    head: str
    accuracy: Measured | None = None
    outputs: str | None = None
    evaluation: Evaluation | None = None
    one_pass: OnePass | None = None
    answers: Answers | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash that is equal for teachers with equal outputs."""
        return digest_of_network(self.network)

    def to_dict(self) -> dict[str, Any]:
        model = self.network.identity.model
        return {
            "model": f"{self.spec.model} ({model})" if self.spec.is_student else model,
            "weight": self.spec.weight,
            "backbone_sha256": self.network.identity.sha256,
            "head": self.head,
            "accuracy": self.accuracy and self.accuracy.value,
            **({"interval": list(self.accuracy[1:])} if self.accuracy else {}),
            "total_parameters": self.network.num_parameters,
            "outputs": self.outputs,
            **({"answers": self.answers.to_dict()} if self.answers is not None else {}),
        }


def load_teacher(
    spec: TeacherSpec,
    recipe: Recipe,
    classes: tuple[str, ...],
    device: torch.device,
    student: Backbone,
    progress: Progress,
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
        require_size_of_run(spec)
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
            return placed(PreparedTeacher(network, spec, key, "its own"), recipe, device)
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
    return placed(PreparedTeacher(network, spec, _key(network, head, spec, recipe), head), recipe, device)


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
        held_out = recipe.data.labeled_part().model_copy(update={"held_out": HELD_OUT})
        part = shared.open(held_out, views.view, progress)
    if teacher.head == "none":
        if spec.prepare == "probe":
            one_pass = None
            if not is_prepared(folder):
                one_pass = fit_head(teacher.network, spec, recipe, folder, part, progress, shared, run_once)
            # The main process makes the folder; the others must not look for it earlier.
            accelerator().wait_for_everyone()
            # Read back from the file by every process, also by the one that fitted it: all have the same bits.
            put_task(teacher.network, folder)
            network, teacher.one_pass = teacher.network, one_pass
        else:
            network, _ = load_task(shared.tuned_teachers[teacher_recipe(recipe, spec).digest()])
        teacher = placed(replace(teacher, network=network, head=spec.prepare), recipe, accelerator().device)
    logits_NC = _adjust_logits(teacher, recipe, views, part, progress)
    if teacher.head == WORDS and views.unlabeled is not None:
        answers = answers_of(teacher.network, views.unlabeled, recipe.train.batch_size, progress, logits_NC)
        teacher = replace(teacher, answers=answers)
    of = f"{views.digest(progress)} {views.view} {recipe.data.skip_bad} {recipe.train.precision} {teacher.fingerprint}"
    network = teacher.network

    found: list[Evaluation] = []
    evaluate = partial(evaluate_as, recipe, network, views.val, accelerator(), progress, "the teacher")

    def evaluated() -> Evaluation:
        found.append(evaluate_once(recipe, network, views, evaluate))
        return found[0]

    # Judged once; the check against chance and the summary both use it.
    accuracy = measured_once(folder, "the teacher", of, evaluated) if len(views.val.split) else None
    teacher = replace(teacher, accuracy=accuracy, evaluation=found[0] if found else None)
    if reusable:
        shared.teachers[teacher.key] = teacher
    return teacher


def _adjust_logits(
    teacher: PreparedTeacher, recipe: Recipe, views: DataViews, held_out: DataViews, progress: Progress
) -> np.ndarray | None:
    """Change a prepared classifier as the recipe says, in place, and say how.

    Returns:
        Its logits (N, C) on the images that it was balanced on, which nothing has to compute again; else None.
    """
    spec, batch_size = teacher.spec, recipe.train.batch_size
    if spec.calibrate:  # where it brought its head, on images that it may have seen
        temperature = calibrate(teacher.network, held_out.val, batch_size, progress)
        how = f"on {len(held_out.val.split)} training images: temperature {temperature:.2f}"
        progress.say(f"{title_of(spec, recipe)} is calibrated {how}")
    if not spec.balance:
        return None
    source = views.train if views.unlabeled is None else views.unlabeled
    how, logits_NC = balance(teacher.network, source, spec.balance, batch_size, progress)
    progress.say(f"{title_of(spec, recipe)} is balanced {how}")
    return logits_NC


def _key(network: Network, head: str, spec: TeacherSpec, recipe: Recipe) -> str:
    """Return backbone, origin of the head, and all that decides how it is fitted."""
    return "|".join(
        [
            network.identity.sha256,
            head,
            f"{spec.model} {spec.weights} {spec.image_size} {spec.classes} {spec.calibrate} {spec.balance}"
            if head == "its own"
            else str(spec.model_dump(mode="json", exclude={"weight", "cache", "cache_dtype", "shard"})),
            str(recipe.data.model_dump(mode="json")),
            str(recipe.seed) if spec.prepare not in ("probe", "none") else "",
        ]
    )


def placed(teacher: PreparedTeacher, recipe: Recipe, device: torch.device) -> PreparedTeacher:
    """Move a teacher to the device, or shard it over those of all processes; choose the run's attention kernel."""
    network = teacher.network
    # Before sharding: the setting is an attribute of modules that FSDP wraps.
    apart = not (teacher.spec.is_student or teacher.spec.joint)  # the others have tensors of the student
    bf16 = use_bf16(recipe.train.precision, device)
    choose_attention(network, recipe.train.fused_attention, device, bf16=bf16, trains=not apart)
    if is_sharded(network):
        return teacher
    if apart and wants_sharding(network, teacher.spec.shard, accelerator()):
        shard([network], device)
    else:
        network.model.to(device)
    return teacher
