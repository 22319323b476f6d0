"""A teacher is loaded, given a head for these classes if it has none, and checked before it may teach."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remap.backbones.build import Backbone, add_tensors
from remap.data.views import ViewSource
from remap.distributed.launch import accelerator
from remap.distributed.sharding import gather_full, is_sharded, shard, wants_sharding
from remap.engine.evaluate import Evaluation, evaluate_as
from remap.engine.self_teachers import averaged_copy, untuned_copy
from remap.errors import TrainingError
from remap.io.atomic_write import require_no_link, require_no_links
from remap.io.checked_read import expanded
from remap.network import Network, choose_attention, tuned
from remap.pipeline import probe
from remap.pipeline.shared import DataViews, SharedResources
from remap.progress import Progress, Within
from remap.recipe.paths import is_run
from remap.recipe.schema import EMA, SELF, LossSpec, MethodSpec, Recipe, StudentSpec, TeacherSpec
from remap.remapping import LOSSES
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task, open_backbone, put_task, require_size_of_run, save_task, task_tensors


@dataclass
class PreparedTeacher:
    """A teacher with what is known of it.

    Attributes:
        key: Equal for teachers that are prepared in the same way.
        head: How its classifier came about: "its own", "probe", a method's name, or "none".
        accuracy: On the evaluation split; None when no loss reads its logits.
        outputs: Where they were in training: "each step", "memory" or "disk".
    """

    network: Network
    spec: TeacherSpec
    key: str
    head: str
    accuracy: float | None = None
    outputs: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Equal for teachers that give equal outputs: all weights, what is made of them, and the input they take."""
        network = self.network
        parts = (network.identity.sha256, network.preprocess, network.anatomy, network.model)
        digest = hashlib.sha256(" ".join(map(repr, parts)).encode())
        add_tensors(digest, {name: gather_full(tensor) for name, tensor in network.tensors.items()})
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        model = self.network.identity.model
        return {
            "model": f"{self.spec.model} ({model})" if self.spec.is_student else model,
            "weight": self.spec.weight,
            "backbone_sha256": self.network.identity.sha256,
            "head": self.head,
            "accuracy": self.accuracy,
            "total_parameters": self.network.num_parameters,
            "outputs": self.outputs,
        }


def load_teacher(
    spec: TeacherSpec, recipe: Recipe, classes: tuple[str, ...], device: torch.device, student: Backbone
) -> PreparedTeacher:
    """The teacher as it comes from its source; a run directory with the same classes brings its own head.

    Args:
        student: The student's backbone before a method is attached to it, for the teacher "self". That one shares its
            tensors, so it stays where they are until the student is ``placed``: methods are attached on the CPU.
    """
    if spec.model == SELF:
        network = untuned_copy(student, classes)
        return PreparedTeacher(network, spec, _key(network, "none", spec, recipe), "none")
    if is_run(spec.model):
        require_size_of_run(spec)
        network, _ = load_task(expanded(spec.model))
        if network.classes == classes:
            key = _key(network, "its own", spec, recipe)
            return placed(PreparedTeacher(network, spec, key, "its own"), recipe, device)
    torch.manual_seed(recipe.seed)
    keep_head = spec.prepare == "none" and needs_logits(recipe)
    network = tuned(open_backbone(spec, len(classes), keep_head=keep_head), "linear", {})
    network.classes = classes
    if not needs_logits(recipe):  # equal for every seed, so that what is kept of its features is found again
        with torch.no_grad():
            for parameter in network.head.values():
                parameter.zero_()
    head = "its own" if keep_head else "none"
    return placed(PreparedTeacher(network, spec, _key(network, head, spec, recipe), head), recipe, device)


def averaging_teacher(spec: TeacherSpec, student: Network) -> PreparedTeacher:
    """The running average of the student, at its start."""
    return PreparedTeacher(averaged_copy(student), spec, EMA, "the student's")


def prepare_teacher(
    teacher: PreparedTeacher,
    recipe: Recipe,
    folder: Path,
    views: DataViews,
    progress: Progress,
    bench: SharedResources,
) -> PreparedTeacher:
    """Fit a head (or tune the whole teacher) if a loss reads its logits and it has none; then evaluate it.

    Args:
        folder: Where the prepared teacher is kept as a task, so that a resumed run finds it.
    """
    spec = teacher.spec
    if not needs_logits(recipe) or spec.model == EMA:
        return teacher
    if bench.teacher_folder is not None:  # one teacher for all runs, whatever their seeds
        teacher = replace(teacher, key=f"shared {spec.model_dump(mode='json')}")
    shared = spec.model != SELF  # it lives on the tensors of one student
    if shared and teacher.key in bench.teachers:
        return bench.teachers[teacher.key]
    if teacher.head == "none":
        if not (folder / "task" / "task.json").is_file():
            _prepare(teacher, recipe, folder, views, progress)
        accelerator().wait_for_everyone()
        if spec.prepare == "probe":
            put_task(teacher.network, folder)
            network = teacher.network
        else:
            network, _ = load_task(folder)
        teacher = placed(replace(teacher, network=network, head=spec.prepare), recipe, accelerator().device)
    found = evaluate_as(recipe, teacher.network, views.val, accelerator(), progress, "the teacher")
    teacher = replace(teacher, accuracy=found.accuracy)
    if shared:
        bench.teachers[teacher.key] = teacher
    return teacher


def require_useful(teacher: PreparedTeacher, untrained: Evaluation, source: ViewSource) -> None:
    """Stop before a teacher that knows nothing teaches it.

    Always naming the most frequent class gives the accuracy p on n images. A teacher must do better than that by two
    standard errors, sqrt(p (1 - p) / n); where images are so few that this bound lies at 1 or above, it must be right
    on all of them.

    Raises:
        TrainingError: It does not, or its accuracy is below the untrained student's.
    """
    if teacher.accuracy is None or teacher.spec.allow_weak:
        return
    count = len(source.split)
    chance = np.bincount(source.split.labels).max() / count
    bound = min(chance + 2 * sqrt(chance * (1 - chance) / count), 1 - 0.5 / count)
    if teacher.accuracy > bound and teacher.accuracy >= untrained.accuracy:
        return
    why = (
        f"below the untrained student's {untrained.accuracy:.1%}"
        if teacher.accuracy > bound
        else f"not clearly above chance (always naming the most frequent class gives {chance:.1%}; "
        f"on {'one image' if count == 1 else f'{count} images'}, luck may reach {bound:.1%})"
    )
    raise TrainingError(
        f"the teacher's accuracy on the evaluation images is {teacher.accuracy:.1%}: {why}",
        given=f"{teacher.network.identity.model}, head: {teacher.head}",
        do="\n           ".join(
            [
                f"start a new run: {_remedy(teacher)}",
                "or let it teach all the same: --set teacher.allow_weak=true",
            ]
        ),
    )


def _remedy(teacher: PreparedTeacher) -> str:
    """What has not been tried yet."""
    if teacher.head == "probe":
        return "tune all of it (--set teacher.prepare=full), choose another teacher or other weights,"
    if teacher.head != "its own":
        return "tune it for longer or at another rate (teacher.epochs, teacher.lr), choose another teacher or weights,"
    if is_run(teacher.spec.model):
        return "choose a better run,"
    return "let its head be fitted (--set teacher.prepare=probe, or full), choose another teacher or other weights,"


def _prepare(teacher: PreparedTeacher, recipe: Recipe, folder: Path, views: DataViews, progress: Progress) -> None:
    from remap.pipeline.run import run  # a tuned teacher is a run like any other

    network, spec = teacher.network, teacher.spec
    name = f"the teacher {spec.model}" if len(recipe.teachers) > 1 else "the teacher"
    require_no_link(folder)  # that of a comparison lies beside its runs
    require_no_links(folder)
    progress.say(f"{name} has no head for these {len(network.classes)} classes: preparing one ({spec.prepare})")
    if spec.prepare == "probe":
        strength = probe.fit_probe(network, views.train, accelerator(), recipe.train.batch_size, progress)
        tensors = task_tensors(network)
        if accelerator().is_main_process:
            save_task(folder / "task", network, views.view, "linear", {}, tensors)
        progress.say(f"fitted by logistic regression on cached features (C = {strength})")
        return
    tuning = teacher_recipe(recipe, spec)
    if accelerator().is_main_process and not (folder / "recipe.yaml").exists():
        RunDir.create(folder, tuning)
    accelerator().wait_for_everyone()
    run(tuning, RunDir(folder), Within(progress, name), SharedResources(), resuming=True)


def teacher_recipe(recipe: Recipe, spec: TeacherSpec) -> Recipe:
    """The recipe that tunes the teacher: the labelled images and the loop of the run, its own method, cross-entropy."""
    train = recipe.train.model_copy(
        update={"epochs": spec.epochs or recipe.train.epochs, "lr": spec.lr, "base_lr": None, "warmup_epochs": None}
    )
    shared = ("model", "weights", "preset", "image_size")
    return recipe.model_copy(
        update={
            "name": f"{recipe.name[:56]}-teacher",
            "data": recipe.data.model_copy(
                update={"views": None, "mixup": 0.0, "cutmix": 0.0, "unlabeled": None, "unlabeled_only": False}
            ),
            "teacher": None,
            "more_teachers": (),
            "student": StudentSpec(**{name: getattr(spec, name) for name in shared}),
            "method": MethodSpec(name=spec.prepare),
            "losses": (LossSpec(name="ce", weight=LOSSES.row("ce").weight),),
            "train": train,
        }
    )


def needs_logits(recipe: Recipe) -> bool:
    """Whether a loss reads the teacher's logits, so that it needs a head."""
    return any(loss.reads_logits for loss in recipe.losses)


def _key(network: Network, head: str, spec: TeacherSpec, recipe: Recipe) -> str:
    """Backbone, where the head comes from, and all that decides how it is fitted."""
    return "|".join(
        [
            network.identity.sha256,
            head,
            f"{spec.model} {spec.image_size}"
            if head == "its own"
            else str(spec.model_dump(mode="json", exclude={"weight", "cache", "cache_dtype", "shard"})),
            str(recipe.data.model_dump(mode="json")),
            str(recipe.seed) if spec.prepare not in ("probe", "none") else "",
        ]
    )


def placed(teacher: PreparedTeacher, recipe: Recipe, device: torch.device) -> PreparedTeacher:
    """The teacher on the device, or sharded over those of all processes, with the run's kernel of attention."""
    network = teacher.network
    choose_attention(network, recipe.train.fused_attention, device)
    if is_sharded(network):
        return teacher
    if not teacher.spec.is_student and wants_sharding(network, teacher.spec.shard, accelerator()):
        shard([network], device)
    else:
        network.model.to(device)
    return teacher
