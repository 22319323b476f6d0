"""Assembly: from a recipe to everything a run is made of, before the first step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remap.bench import Bench, Views
from remap.data import keyed
from remap.data.views import View
from remap.engine.features import FrozenFeatures
from remap.engine.launch import accelerator, use_bf16
from remap.engine.teacher import Teacher
from remap.network import Network, Runner, choose_attention, frozen, tuned
from remap.progress import Progress
from remap.recipe import Recipe
from remap.remapping import LOSSES
from remap.remapping.objective import Objective, Pair
from remap.runs.rundir import RunDir
from remap.runs.task import open_backbone
from remap.teachers import PreparedTeacher, load_teacher, prepare_teacher
from remap.tuning.base import Sample


@dataclass
class Parts:
    """Everything built for a run, before the first step."""

    recipe: Recipe
    views: Views
    student: Network
    teacher: PreparedTeacher | None
    objective: Objective
    bf16: bool


def assemble(recipe: Recipe, run_dir: RunDir | None, progress: Progress, bench: Bench) -> Parts:
    """Open the data and build both networks and the objective.

    Args:
        run_dir: Where a prepared teacher is kept; None (dry run) prepares none.
    """
    device = accelerator().device
    bf16 = use_bf16(recipe.train.precision, device)
    classes = bench.classes(recipe.data)
    with progress.wait("building the student"):
        torch.manual_seed(recipe.seed)
        student = tuned(open_backbone(recipe.student, len(classes)), recipe.method.name, recipe.method.options)
    student.classes = classes
    student.model.to(device)
    choose_attention(student, recipe.train.fused_attention, device)
    loaded = None
    if recipe.teacher is not None:
        with progress.wait("building the teacher"):
            loaded = load_teacher(recipe, classes, device)
    size = max(student.preprocess.size, loaded.network.preprocess.size if loaded else 0)
    view = View(size, student.preprocess.crop_pct, student.preprocess.interpolation)
    views = bench.open(recipe.data, view, progress)
    if views.skipped:
        progress.say(f"skipped {len(views.skipped)} file(s): {listed(views.skipped)}")
    teacher = None
    if loaded is not None:
        teacher = prepare_teacher(loaded, recipe, run_dir, views, progress, bench) if run_dir else loaded
        frozen(teacher.network)
    torch.manual_seed(recipe.seed)
    objective = build_objective(recipe, student, teacher.network if teacher else None)
    return Parts(recipe, views, student, teacher, objective, bf16)


def listed(files: Sequence[tuple[str, str]]) -> str:
    """Names with reasons; the first five of many."""
    shown = ", ".join(f"{name} ({reason})" for name, reason in files[:5])
    return shown + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def build_objective(recipe: Recipe, student: Network, teacher: Network | None) -> Objective:
    """The recipe's loss terms for this pair of networks."""
    pair = Pair(student.anatomy, teacher.anatomy if teacher else None, len(student.classes or ()))
    terms = {}
    for loss in recipe.losses:
        cls = LOSSES.load(loss.name)
        terms[loss.name] = cls(pair, cls.Config(**loss.options))
    return Objective(terms, {loss.name: loss.weight for loss in recipe.losses})


def teacher_in_training(parts: Parts, bench: Bench, progress: Progress) -> Teacher | None:
    """The teacher behind the objective; with a fixed view its outputs are computed once and shared."""
    if parts.teacher is None or not parts.objective.uses_teacher:
        return None
    spec = parts.recipe
    teacher = Teacher(parts.teacher.network, parts.objective, accelerator(), bf16=parts.bf16)
    if not keeps_outputs(parts, teacher):
        return teacher
    view, train = parts.views.view, parts.views.train
    losses = tuple(loss.model_dump_json() for loss in spec.losses)
    anatomy = parts.student.anatomy
    key = (
        parts.teacher.key,
        spec.data.source,
        view,
        losses,
        anatomy.grid,
        anatomy.depth,
        anatomy.has_class_token,
        parts.bf16,
    )
    if key in bench.targets:
        teacher.kept = bench.targets[key]
    else:
        teacher.precompute(train, spec.train.batch_size, progress)
        bench.targets[key] = teacher.kept
    return teacher


def keeps_outputs(parts: Parts, teacher: Teacher) -> bool:
    """Whether the teacher's outputs are computed once: the view of an image never changes, and they fit in memory."""
    recipe, train = parts.recipe, parts.views.train
    needed = teacher.bytes_per_image(parts.views.view.size) * len(train.split)
    fixed = recipe.data.augment == "none" and recipe.teacher.cache == "auto"
    return fixed and needed <= recipe.data.memory_gib * 2**30


def features_in_training(parts: Parts, progress: Progress) -> dict[str, FrozenFeatures]:
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
    for name, source, what in (
        ("train", parts.views.train, "training images"),
        ("val", parts.views.val, "evaluation images"),
    ):
        made[name] = FrozenFeatures(parts.student, source, accelerator(), bf16=parts.bf16)
        made[name].compute(max(64, parts.recipe.train.batch_size), progress, what)
    count = sum(len(features.split) for features in made.values())
    progress.say(
        f"frozen features of {count} images kept: {needed / 2**20:.1f} MiB, computed once in "
        f"{time.perf_counter() - started:.1f} s"
    )
    return made


def feature_bytes(parts: Parts) -> int | None:
    """What keeping the frozen features of all images takes; None where they cannot be kept."""
    seam = parts.student.attached.seam
    attention = parts.objective.student_needs().attention
    if seam is None or parts.recipe.data.augment != "none" or any(index < seam.first_block for index in attention):
        return None
    each = FrozenFeatures(parts.student, parts.views.train, accelerator(), bf16=parts.bf16).bytes_per_image()
    return each * (len(parts.views.train.split) + len(parts.views.val.split))


def sample_for(parts: Parts, images: int = 512, batch_size: int = 32) -> Sample:
    """Training images for methods that look at some before the first step: the same ones for a seed."""
    source, preprocess = parts.views.train, Runner(parts.student).preprocess
    order = keyed.permutation(parts.recipe.seed, 0, len(source.split))[:images]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(order), batch_size):
            pixels, good = source.batch(order[start : start + batch_size])
            if len(good):
                device = accelerator().device
                yield preprocess(pixels.to(device)), torch.from_numpy(source.split.labels[good]).to(device)

    return Sample(batches, len(parts.views.data.classes))
