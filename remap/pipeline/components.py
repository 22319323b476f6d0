"""Everything a run is made of, before its first step: the networks, the data as they see it, and the objective."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from remap.backbones.build import Backbone, add_tensors
from remap.backbones.preprocess import require_channels
from remap.data.augmented_pixels import require_colours
from remap.data.image_files import left_out
from remap.data.views import ViewSource, listed
from remap.distributed.launch import accelerator, use_bf16
from remap.distributed.sharding import bytes_held, gather_full, is_sharded
from remap.engine.self_teachers import copy_trained_tensors
from remap.errors import TrainingError
from remap.io.human_size import number_of, size
from remap.io.paths import expanded
from remap.network import Network, choose_kernels, tuned
from remap.pipeline.class_words import write_words
from remap.pipeline.data_views import DataViews
from remap.pipeline.init_student import InitReport, init_from_teacher
from remap.pipeline.objective import build_objective, pairs_of
from remap.pipeline.one_pass import run_once
from remap.pipeline.prepared_teacher import PreparedTeacher, placed
from remap.pipeline.shared import SharedResources
from remap.pipeline.shared_cores import frozen_or_joint
from remap.pipeline.shrink_student import open_student
from remap.pipeline.teacher_tuning import teacher_folder
from remap.pipeline.teachers import averaging_teacher, load_teacher, prepare_teacher
from remap.pipeline.teachers_words import lend_words
from remap.progress import Progress
from remap.recipe import Recipe
from remap.recipe.schema import EMA, SELF, DataSpec
from remap.remapping.knowledge.attention import transfer_warning
from remap.remapping.objective import Objective
from remap.runs.run_dir import RunDir
from remap.runs.task import open_backbone, start_from
from remap.tuning import parts_of


@dataclass
class RunComponents:
    """Everything built for a run.

    Attributes:
        views: The data, seen through the one view that all networks start from.
        bf16: Whether the networks run under bfloat16 autocast.
        init: What the student's backbone took from its teacher; None where it starts from its own weights.
    """

    recipe: Recipe
    views: DataViews
    student: Network
    teachers: list[PreparedTeacher]
    objective: Objective
    bf16: bool
    init: InitReport | None = None

    @property
    def training_source(self) -> ViewSource:
        """The images the student learns from; without labels only where a loss learns from those."""
        return self.views.training_source if self.objective.learns_unlabeled else self.views.train

    @property
    def labeled_share(self) -> float:
        """Share of ``training_source`` that has a label."""
        return self.views.labeled_share if self.objective.learns_unlabeled else 1.0

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.recipe.train.epochs * max(1, len(self.training_source.split) // self.recipe.train.batch_size)

    @property
    def judges(self) -> bool:
        """Whether the student's answers can be compared with labels."""
        return not self.recipe.label_free and len(self.views.val.split) > 0

    @property
    def process_images(self) -> int:
        """One process's share of the images of a training step."""
        images = min(self.recipe.train.batch_size, len(self.training_source.split))
        return max(1, images // accelerator().num_processes)

    @property
    def pass_images(self) -> int:
        """How many images a network sees at once in training."""
        return max(1, self.process_images // self.recipe.train.accumulation)

    def weights_digest(self) -> str:
        """Return which weights the student and its teachers came with, and those of the teachers' heads."""
        digest = hashlib.sha256(self.student.identity.sha256.encode())
        for teacher in self.teachers:
            digest.update(teacher.network.identity.sha256.encode())
            if teacher.spec.model != EMA:  # which changes in training
                add_tensors(digest, {name: gather_full(tensor) for name, tensor in teacher.network.tensors.items()})
            if teacher.folds is not None:
                digest.update(teacher.folds.digest.encode())
        return digest.hexdigest()[:16]


def build_components(
    recipe: Recipe, run_dir: RunDir | None, progress: Progress, shared: SharedResources
) -> RunComponents:
    """Open the data and build all networks and the objective.

    Args:
        run_dir: Where prepared teachers are stored; None (dry run, benchmarks) prepares none.
    """
    # Only names and labels are listed here; images are decoded once the size of a view is known.
    classes = shared.classes(recipe)

    # The student's draws are the same with and without teachers: these fork the generator, and methods attach last.
    with progress.wait("building the student"):
        torch.manual_seed(recipe.seed)
        backbone = open_student(recipe, run_dir, progress, shared)
    init = init_from_teacher(backbone, recipe, shared, progress)  # before a method changes the modules
    teachers = _load_teachers(recipe, classes, backbone, progress)
    write_words(backbone, recipe.data, classes, progress)
    lend_words(backbone, teachers, recipe, classes, progress)
    student = _tune(recipe, classes, backbone)
    for teacher in teachers:
        # Frozen tensors stay shared with the student; what it will train is copied before the first step.
        if teacher.spec.model == SELF:
            copy_trained_tensors(teacher.network, student)
            placed(teacher, recipe)
    _warn_of_transfers(recipe, student, teachers, progress)

    networks = (student, *(teacher.network for teacher in teachers))
    view = shared.view(recipe.data, [network.preprocess for network in networks])
    for network in networks:
        require_channels(view.shape[0], network.preprocess.shape[0], network.identity.model)
    require_colours(recipe.data.augmentation, view.shape[0])
    if view.pixels.value_range is not None:
        low, high = view.pixels.value_range
        text = f"images of more than 8 bits: values from {low:g} to {high:g} become 0 to 255 (data.value_range)"
        shared.say_once(progress, text)
    views = shared.open(recipe.data, view, progress)
    for note in _notes(views, recipe.data):
        shared.say_once(progress, note)

    # A dry run builds the same networks, but fits and tunes nothing.
    if run_dir is not None:
        for number, teacher in enumerate(teachers):
            folder = teacher_folder(teacher.spec, number, run_dir, shared)
            once = partial(run_once, recipe, views, student, [one.network for one in teachers], number, progress)
            teachers[number] = prepare_teacher(teacher, recipe, folder, views, progress, shared, once)
    for number, spec in enumerate(recipe.teachers):
        if spec.model == EMA:  # it starts from the student, so it comes last and takes its place in the list
            teachers.insert(number, averaging_teacher(spec, student))
    teachers = [frozen_or_joint(teacher, student, recipe) for teacher in teachers]
    torch.manual_seed(recipe.seed)  # projectors of losses do not depend on what was prepared before
    objective = build_objective(recipe, pairs_of(student, [teacher.network for teacher in teachers]))
    bf16 = use_bf16(recipe.train.precision, accelerator().device)
    return RunComponents(recipe, views, student, teachers, objective, bf16, init)


def _notes(views: DataViews, spec: DataSpec) -> Iterator[str]:
    """Yield what a user should know of the files that are left out."""
    if views.unreadable:
        yield f"left out {number_of(len(views.unreadable), 'image')} that cannot be read: {listed(views.unreadable)}"
    labeled, read = len(views.data.train), len(views.train.split)
    if read < labeled and (spec.labels is not None or spec.per_class is not None):
        yield f"{read} of the {labeled} labels that were chosen are used: no others replace those of unreadable images"
    if views.data.skipped:
        yield left_out(views.data.skipped)


def require_student(recipe: Recipe, shared: SharedResources) -> None:
    """Build the student and drop it again, to find a model or method that does not fit early.

    Raises:
        BackboneError: The student cannot be built, or the method does not fit it.
    """
    if recipe.student.shrink is None:  # else it comes from the teacher
        with torch.random.fork_rng(devices=[]):  # the draws of the run stay as they are
            backbone = open_backbone(recipe.student, len(shared.classes(recipe)))
            require_trainable(tuned(backbone, recipe.method.name, recipe.method.options), recipe)


def require_trainable(student: Network, recipe: Recipe) -> None:
    """Refuse options of training that the student's method, width or blocks cannot follow.

    Raises:
        TrainingError: The method prunes while an earlier student may be kept, blocks cannot be computed twice, or the
            learning rate would rise to ``min_lr``.
    """
    train, peak = recipe.train, recipe.learning_rate(student.anatomy.width)
    if train.by_steps and train.min_lr > peak:
        raise TrainingError(
            "train.min_lr is above the peak learning rate, which would not fall",
            given=f"train.min_lr={train.min_lr:g}, peak {peak:g} for {recipe.method.name} at {student.identity.model}",
            do="lower train.min_lr, or set train.lr",
        )
    if (names := student.attached.pruning) and (train.selects or train.ema is not None):
        raise TrainingError(
            f"{' and '.join(names)} chooses in training what it keeps, so only its last student is complete",
            given=f"train.keep={train.keep}, train.patience={train.patience}, train.ema={train.ema}",
            do="leave them out, or take another method",
        )
    if train.checkpoint_blocks and student.learns_batch_statistics:
        raise TrainingError(
            "blocks with batch statistics cannot be computed twice",
            given=f"{student.identity.model}, train.checkpoint_blocks=true",
            do="leave train.checkpoint_blocks out, and raise train.accumulation to save memory",
        )


def _load_teachers(
    recipe: Recipe, classes: tuple[str, ...], student: Backbone, progress: Progress
) -> list[PreparedTeacher]:
    """Load all teachers but a running average, which starts from the tuned student."""
    specs = [spec for spec in recipe.teachers if spec.model != EMA]
    if not specs:
        return []
    what = "building the teacher" if len(specs) == 1 else f"building {len(specs)} teachers"
    with progress.wait(what), torch.random.fork_rng(devices=[]):
        teachers = [load_teacher(spec, recipe, classes, student, progress) for spec in specs]
    for teacher in teachers:
        if is_sharded(teacher.network):
            held = size(bytes_held(teacher.network))
            progress.say(f"the teacher {teacher.spec.model} is sharded: {held} per process")
    return teachers


def _tune(recipe: Recipe, classes: tuple[str, ...], backbone: Backbone) -> Network:
    student, train = tuned(backbone, recipe.method.name, recipe.method.options), recipe.train
    student.classes, student.task = classes, recipe.data.task
    if recipe.student.extends is not None:
        start_from(student, expanded(recipe.student.extends), classes, head=train.by_steps)
    require_trainable(student, recipe)
    device = accelerator().device
    # Attached on the CPU first, so that draws do not depend on the device.
    if not any(p.is_meta for p in student.model.parameters()):  # those have shapes alone, and no values to move
        student.model.to(device)
    choose_kernels(student, train.fused_attention, device, bf16=use_bf16(train.precision, device), trains=True)
    return student


def _warn_of_transfers(
    recipe: Recipe, student: Network, teachers: Sequence[PreparedTeacher], progress: Progress
) -> None:
    used = [loss.name for loss in recipe.losses] + parts_of(recipe.method.name)
    for teacher in teachers:
        warning = transfer_warning(teacher.network.identity.model, student.identity.model, used)
        if warning is not None and teacher.spec.model != SELF:
            progress.say(warning)
