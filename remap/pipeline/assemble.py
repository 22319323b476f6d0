"""Assembly: from a recipe to everything a run is made of, before the first step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from remap.backbones.build import Backbone
from remap.cache.frozen_features import FrozenFeatures
from remap.data import keyed_random
from remap.data.views import View, ViewSource, listed
from remap.distributed.launch import accelerator, use_bf16
from remap.distributed.sharding import bytes_held, is_sharded
from remap.engine.evaluate import batch_size_of_evaluation
from remap.engine.self_teachers import copy_trained_tensors
from remap.io.atomic_write import size
from remap.network import Network, Runner, choose_attention, frozen, tuned
from remap.pipeline.init_student import InitReport, init_from_teacher
from remap.pipeline.shared import DataViews, SharedResources
from remap.pipeline.shrink_student import open_student
from remap.pipeline.teachers import PreparedTeacher, averaging_teacher, load_teacher, placed, prepare_teacher
from remap.progress import Progress
from remap.recipe import Recipe
from remap.recipe.schema import EMA, SELF
from remap.remapping import LOSSES
from remap.remapping.knowledge.attention import transfer_warning
from remap.remapping.objective import LossTerm, Objective, Pair
from remap.runs.run_dir import RunDir
from remap.tuning import parts_of
from remap.tuning.base import Sample


@dataclass
class RunComponents:
    """Everything built for a run, before the first step."""

    recipe: Recipe
    views: DataViews
    student: Network
    teachers: list[PreparedTeacher]
    objective: Objective
    bf16: bool
    inherited: InitReport | None = None

    @property
    def lessons(self) -> ViewSource:
        """The images the student learns from; without labels only where a loss listens to a teacher."""
        return self.views.lessons if self.objective.uses_teacher else self.views.train

    @property
    def labeled_share(self) -> float:
        """Share of ``lessons`` that have a label."""
        return self.views.labeled_share if self.objective.uses_teacher else 1.0


def assemble(recipe: Recipe, run_dir: RunDir | None, progress: Progress, bench: SharedResources) -> RunComponents:
    """Open the data and build all networks and the objective.

    Args:
        run_dir: Where prepared teachers are kept; None (dry run) prepares none.
    """
    device = accelerator().device
    bf16 = use_bf16(recipe.train.precision, device)
    classes = bench.classes(recipe.data)
    with progress.wait("building the student"):
        torch.manual_seed(recipe.seed)
        backbone = open_student(recipe, run_dir, progress, bench)
    inherited = init_from_teacher(backbone, recipe, bench, progress)
    teachers = _teachers(recipe, classes, backbone, progress)
    student = _student(recipe, classes, backbone)
    for teacher in teachers:
        if teacher.spec.model == SELF:
            copy_trained_tensors(teacher.network, student)
            placed(teacher, recipe, device)
    _warn(recipe, student, teachers, progress)
    size = max(student.preprocess.size, *(teacher.network.preprocess.size for teacher in teachers), 0)
    view = View(size, student.preprocess.crop_pct, student.preprocess.interpolation)
    views = bench.open(recipe.data, view, progress)
    if views.unreadable:
        progress.say(f"left out {len(views.unreadable)} image(s) that cannot be read: {listed(views.unreadable)}")
    if views.data.skipped:
        progress.say(f"not used, {len(views.data.skipped)} other file(s): {listed(views.data.skipped)}")
    if run_dir is not None:
        for number, teacher in enumerate(teachers):
            # "self" lives on the weights of one student, which may be random.
            own = bench.teacher_folder is None or teacher.spec.model == SELF
            folder = _folder(run_dir.teacher if own else bench.teacher_folder, number)
            teachers[number] = prepare_teacher(teacher, recipe, folder, views, progress, bench)
    for number, spec in enumerate(recipe.teachers):
        if spec.model == EMA:
            teachers.insert(number, averaging_teacher(spec, student))
    for teacher in teachers:
        frozen(teacher.network)
    torch.manual_seed(recipe.seed)
    objective = build_objective(recipe, student, [teacher.network for teacher in teachers])
    return RunComponents(recipe, views, student, teachers, objective, bf16, inherited)


def _teachers(recipe: Recipe, classes: tuple[str, ...], student: Backbone, progress: Progress) -> list[PreparedTeacher]:
    """All teachers but a running average, which starts from the tuned student."""
    specs = [spec for spec in recipe.teachers if spec.model != EMA]
    if not specs:
        return []
    what = "building the teacher" if len(specs) == 1 else f"building {len(specs)} teachers"
    # The student's draws go on afterwards as if there were no teacher.
    with progress.wait(what), torch.random.fork_rng(devices=[]):
        teachers = [load_teacher(spec, recipe, classes, accelerator().device, student) for spec in specs]
    for teacher in teachers:
        if is_sharded(teacher.network):
            progress.say(f"the teacher {teacher.spec.model} is sharded: {size(bytes_held(teacher.network))} a process")
    return teachers


def _student(recipe: Recipe, classes: tuple[str, ...], backbone: Backbone) -> Network:
    student = tuned(backbone, recipe.method.name, recipe.method.options)
    student.classes = classes
    student.model.to(accelerator().device)
    choose_attention(student, recipe.train.fused_attention, accelerator().device)
    return student


def _warn(recipe: Recipe, student: Network, teachers: Sequence[PreparedTeacher], progress: Progress) -> None:
    used = [loss.name for loss in recipe.losses] + parts_of(recipe.method.name)
    for teacher in teachers:
        warning = transfer_warning(teacher.network.identity.model, student.identity.model, used)
        if warning is not None and teacher.spec.model != SELF:
            progress.say(warning)


def _folder(first: Path, number: int) -> Path:
    """teacher, teacher-2, teacher-3 ..."""
    return first if number == 0 else first.with_name(f"{first.name}-{number + 1}")


def build_objective(recipe: Recipe, student: Network, teachers: Sequence[Network]) -> Objective:
    """The recipe's loss terms; each listens to every teacher, and its weight is shared out among them."""
    terms: dict[str, LossTerm] = {}
    weights: dict[str, float] = {}
    teacher_of: dict[str, int] = {}
    total = sum(spec.weight for spec in recipe.teachers)
    for loss in recipe.losses:
        cls = LOSSES.load(loss.name)
        config = cls.Config(**loss.options)
        if len(teachers) < 2 or not cls.uses_teacher:
            pair = Pair(student.anatomy, teachers[0].anatomy if teachers else None, len(student.classes or ()))
            terms[loss.name], weights[loss.name] = cls(pair, config), loss.weight
            continue
        for number, (teacher, spec) in enumerate(zip(teachers, recipe.teachers, strict=True)):
            name = f"{loss.name}@{number + 1}"
            terms[name] = cls(Pair(student.anatomy, teacher.anatomy, len(student.classes or ())), config)
            weights[name], teacher_of[name] = loss.weight * spec.weight / total, number
    return Objective(terms, weights, teacher_of)


def images_of_process(parts: RunComponents) -> int:
    """One process's share of the images of a training step."""
    return max(1, min(parts.recipe.train.batch_size, len(parts.lessons.split)) // accelerator().num_processes)


def images_at_once(parts: RunComponents) -> int:
    """How many of these a network sees at once in training."""
    return max(1, images_of_process(parts) // parts.recipe.train.accumulation)


def features_in_training(parts: RunComponents, progress: Progress) -> dict[str, FrozenFeatures]:
    """The student's frozen features of the training and evaluation images, by "train" and "val", where they are kept.

    Empty where the method changes the network from its first layer on, where views change, where a loss reads
    attention inside the frozen part, or where memory does not suffice.
    """
    needed = feature_bytes(parts)
    if needed is None:
        return {}
    if needed > parts.recipe.data.memory_gib * 2**30:
        progress.say(f"frozen features are not kept: they would take {needed / 2**30:.1f} GiB (data.memory_gib)")
        return {}
    started = time.perf_counter()
    made: dict[str, FrozenFeatures] = {}
    for name, source in (("train", parts.lessons), ("val", parts.views.val)):
        made[name] = FrozenFeatures(parts.student, source, accelerator(), bf16=parts.bf16)
    made["train"].compute(images_of_process(parts), images_at_once(parts), progress, "training images")
    made["val"].compute(batch_size_of_evaluation(parts.recipe), 0, progress, "evaluation images")
    count = sum(len(features.split) for features in made.values())
    progress.say(
        f"frozen features of {count} images kept: {needed / 2**20:.1f} MiB, computed once in "
        f"{time.perf_counter() - started:.1f} s"
    )
    return made


def feature_bytes(parts: RunComponents) -> int | None:
    """What keeping the frozen features of all images takes; None where they cannot be kept."""
    seam, data, depth = parts.student.attached.seam, parts.recipe.data, parts.student.anatomy.depth
    if seam is None or data.augment != "none" or not data.finite_views:
        return None
    if any(index < seam.first_block or index == depth for index in parts.objective.student_needs().blocks):
        return None
    each = FrozenFeatures(parts.student, parts.lessons, accelerator(), bf16=parts.bf16).bytes_per_image()
    return each * (len(parts.lessons.split) + len(parts.views.val.split))


def sample_for(parts: RunComponents, images: int = 512, batch_size: int = 32) -> Sample:
    """Training images for methods that look at some before the first step: the same ones for a seed."""
    source, preprocess = parts.views.train, Runner(parts.student).preprocess
    order = keyed_random.permutation(parts.recipe.seed, 0, len(source.split))[:images]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(order), batch_size):
            pixels, good = source.batch(order[start : start + batch_size])
            if len(good):
                device = accelerator().device
                yield preprocess(pixels.to(device)), torch.from_numpy(source.split.labels[good]).to(device)

    return Sample(batches, len(parts.views.data.classes))
