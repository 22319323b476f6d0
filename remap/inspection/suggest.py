"""A commented recipe for a folder of images on this machine, to begin with."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from remap.backbones.build import require_at_hand
from remap.data import CLASSES, METRIC, MULTILABEL
from remap.data.images import BadImage, decode, reason_of
from remap.data.sources import open_data
from remap.data.splits import ImageData
from remap.distributed.launch import use_bf16
from remap.errors import DataError, RemapError, RunError
from remap.io import atomic_write
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.io.paths import expanded
from remap.progress import Progress, Silent
from remap.recipe.catalogue import require_findable
from remap.recipe.paths import absolute_data
from remap.recipe.resolution import load
from remap.recipe.schema import Recipe

# Images that are opened to learn their size.
SAMPLE = 64
# A longer side than this, in pixels, has details that the embedded pair of 32 pixels does not see.
SMALL = 64
# Training images of the smallest class from which on each part that a teacher is judged by (a fifth) has one of it.
LEAST_TO_JUDGE = 5
# Memory of a GPU, in bytes, above which the larger teacher fits beside a student.
LARGE_GPU = 20e9


@dataclass(frozen=True)
class Choice:
    """A value of the recipe, and why it is suggested."""

    value: object
    why: str


def init_recipe(
    source: str, path: Path, task: str = CLASSES, progress: Progress = Silent(), depth: int | None = None
) -> Recipe:
    """Write a commented recipe for the images of a source, and return it.

    Where models that suit photographs cannot be had, it names the embedded pair, which is said.

    Args:
        task: What a label is.
        depth: Level of the folders that are the classes; None is 1, and refuses class folders that hold only folders.

    Raises:
        RecipeError: The path does not end in .yaml.
        RunError: There is a file at the path already, or it cannot be written.
        DataError: The source cannot be opened, as a run would say, or none of its images can be read.
    """
    path = expanded(path)
    require_findable(path)
    if path.exists() or path.is_symlink():
        raise RunError(f"{path} is there already", do="choose another --output, or remove it")
    data = open_data(source, None, 0.2, depth=depth, task=task)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    atomic_write.make_folder(path.parent)
    atomic_write.write_text(path, recipe_text(source, data, device, progress, depth))
    return load(path)


def recipe_text(
    source: str, data: ImageData, device: torch.device, progress: Progress = Silent(), depth: int | None = None
) -> str:
    """Return the YAML, every choice with a comment that says why."""
    teacher, student = _models(_longer_side(data), device, progress)
    images, gpu = len(data.train), device.type != "cpu"
    epochs = 60 if images < 1_000 else 30 if images < 20_000 else 10
    batch = 32 if images < 2_000 else 64 if images < 50_000 or not gpu else 128
    bf16, metric = use_bf16("auto", device), METRIC[MULTILABEL if data.train.labels.ndim == 2 else CLASSES]
    choices = {
        "teacher.model": teacher,
        "teacher.prepare": _preparation(teacher.value, int(min(data.count(data.train)))),
        "student": student,
        "method": Choice(
            "lora", "trains a few percent and merges; `remap methods` lists others, `remap compare` tries some"
        ),
        "train.epochs": Choice(epochs, f"for {images:,} training images; more if the {metric} still rises at the end"),
        "train.batch_size": Choice(batch, "images per update; halves itself where memory runs out"),
        "train.precision": Choice("auto", f"on this machine {'bf16' if bf16 else 'fp32'}"),
    }
    listed = [f"{plain(name)} ({count:,})" for name, count in zip(data.classes, data.count(data.train), strict=True)]
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    lines = [
        f"# {plain(source)}: {len(data.classes)} classes, {images:,} training and {len(data.val):,} evaluation images.",
        f"# Training images by class: {', '.join(listed[:20])}{more}",
        *(
            f"# Left out: {number_of(len(data.skipped), 'other file')}; `remap data check` lists them."
            for _ in data.skipped[:1]
        ),
        "# Start: remap distill --recipe THIS_FILE. Every field: `remap recipes show digits --resolved`.",
        *(["task: multilabel  # any number of classes an image"] if data.train.labels.ndim == 2 else []),
        "data:",
        f"  source: {_quoted(absolute_data(source))}",
        *([f"  depth: {depth}  # level of the folders that are the classes"] if depth is not None else []),
        f"  # {plain(data.split_rule)}",
    ]
    section = ""
    for key, choice in choices.items():
        head, _, field = key.rpartition(".")
        if head and head != section:
            lines.append(f"{head}:")
        section = head
        lines.append(f"{'  ' if head else ''}{field}: {json.dumps(choice.value)}  # {choice.why}")
    return "\n".join(lines) + "\n"


def _preparation(teacher: object, fewest: int) -> Choice:
    """Return how a teacher gets a head: one as small as the embedded ones is tuned where that is better.

    Args:
        fewest: Training images of the smallest class, of which a fifth is held out to judge the ways.
    """
    if teacher == "mini_teacher" and fewest >= LEAST_TO_JUDGE:
        return Choice("auto", "tries a head alone and tuning all of it on held-out images; probe, a head, is quicker")
    return Choice("probe", "fits only a head for these classes; full tunes all of it, slower and better")


def _quoted(text: str) -> str:
    """Return text as YAML reads it."""
    return atomic_write.utf8_json(text).decode()


def _models(side: int, device: torch.device, progress: Progress) -> tuple[Choice, Choice]:
    """Return teacher and student: the embedded pair for small pictures, or where no others can be had."""
    if side <= SMALL:
        why = f"the pictures have about {side} pixels; the embedded pair takes 32"
        return Choice("mini_teacher", why), Choice("mini_student", why)
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > LARGE_GPU
    wanted = ("vit_large", "vit_small") if large else ("vit_base", "vit_small" if device.type != "cpu" else "vit_tiny")
    try:
        for name in wanted:
            require_at_hand(name, "pretrained")
    except RemapError:
        why = f"embedded; {wanted[0]} with {wanted[1]} suits photographs better, but cannot be downloaded now"
        progress.say(
            f"note: {wanted[0]} and {wanted[1]} cannot be downloaded now, so the recipe names the embedded pair, which"
            " was trained on images of 32 pixels; where there is a network, remove the recipe and run this again"
        )
        return Choice("mini_teacher", why), Choice("mini_student", why)
    memory = "this GPU's memory" if device.type == "cuda" else "this machine"
    return Choice(wanted[0], f"as large as suits {memory}"), Choice(wanted[1], "what you will use afterwards")


def _longer_side(data: ImageData) -> int:
    """Return the median of the longer sides of some images, in pixels.

    Raises:
        DataError: None of them can be read by models of colours.
    """
    step, sides, reasons = max(1, len(data.train) // SAMPLE), [], list[str]()
    for index in range(0, len(data.train), step):
        try:
            sides.append(max(decode(data.train.read(index)).size))
        except (BadImage, OSError) as error:
            reasons.append(error.reason if isinstance(error, BadImage) else reason_of(error))
    if not sides:
        given, do = f"{reasons[0]} ({number_of(len(reasons), 'image')})", "`remap data check` lists all with the reason"
        raise DataError("none of the images that were looked at can be read", given=given, do=do)
    return sorted(sides)[len(sides) // 2]
