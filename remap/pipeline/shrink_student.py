"""Students cut from their teacher: inside a run, and on their own as model folders of timm."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from remap.backbones.build import Backbone
from remap.backbones.model_folder import require_free
from remap.distributed.launch import accelerator, require_one_process
from remap.errors import BackboneError
from remap.pipeline.samples import training_pixels
from remap.pipeline.shared import SharedResources
from remap.progress import Progress, Silent
from remap.recipe.paths import is_run
from remap.recipe.problems import checked
from remap.recipe.schema import DataSpec, ModelSpec, Recipe, ShrinkSpec, StudentSpec
from remap.remapping.architecture.shrink import Shrunk, shrink, target_shape
from remap.remapping.architecture.skip import gates_of, save_remaining
from remap.runs.run_dir import RunDir
from remap.runs.run_records import STUDENT_MODEL
from remap.runs.task import load_task, open_backbone

_BATCH = 16


def open_student(recipe: Recipe, run_dir: RunDir | None, progress: Progress, shared: SharedResources) -> Backbone:
    """The recipe's student; one that is to be shrunk is cut from the first teacher before.

    It is then ``RUN_DIR/student_model``, which a resumed run finds again.

    Args:
        run_dir: None (dry run) cuts it into a temporary folder.

    Raises:
        RemapError: The student cannot be cut, or cannot be opened.
    """
    num_classes = len(shared.classes(recipe))
    if recipe.student.shrink is None:
        # Drawing the weights of a ViT-L takes longer than its forward pass.
        with torch.device("meta") if shared.shapes_only and recipe.student.weights == "none" else nullcontext():
            backbone = open_backbone(recipe.student, num_classes)
        for note in backbone.notes:
            progress.say(f"the student: {note}")
        return backbone
    if run_dir is None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / STUDENT_MODEL
            _derive(recipe, folder, progress, shared)
            # Inside the block: the weights are read before the folder is removed.
            backbone = open_backbone(_opened_from(recipe.student, folder), num_classes)
        # The temporary folder is gone by the time anyone reads the name.
        backbone.identity = replace(backbone.identity, model=recipe.student.model)
        return backbone
    folder = run_dir.student_model.resolve()
    # One process cuts; a resumed run finds the folder and must not cut again.
    if accelerator().is_main_process and not folder.is_dir():
        _derive(recipe, folder, progress, shared)
    # The others open the folder once it is complete.
    accelerator().wait_for_everyone()
    return open_backbone(_opened_from(recipe.student, folder), num_classes)


def _opened_from(spec: StudentSpec, folder: Path) -> StudentSpec:
    return spec.model_copy(update={"model": f"local-dir:{folder}", "shrink": None})


def _derive(recipe: Recipe, folder: Path, progress: Progress, shared: SharedResources) -> None:
    teacher, spec = recipe.teacher, recipe.student.shrink
    assert teacher is not None and spec is not None
    # A resumed run, which finds its student already cut, must draw the same numbers from here on.
    with torch.random.fork_rng(devices=[]):
        shrunk = _cut(teacher, spec, recipe.data, folder, recipe.seed, progress, shared)
    progress.say(f"the student is cut from {teacher.model}: {shrunk_text(shrunk)}")


def require_shape(teacher: ModelSpec, spec: ShrinkSpec) -> None:
    """Refuse a shape that cannot be cut from a teacher, in seconds, before it is prepared.

    Raises:
        BackboneError: timm could not build it, or it is not a part of this teacher.
    """
    known = is_run(teacher.model) or teacher.weights != "pretrained"
    target_shape(open_backbone(teacher if known else teacher.model_copy(update={"weights": "none"}), 1), spec)


def cut(
    teacher: ModelSpec, spec: ShrinkSpec, data: DataSpec, folder: Path, seed: int = 0, progress: Progress = Silent()
) -> Shrunk:
    """Cut a student from a teacher and write it as a model folder of timm.

    Args:
        teacher: Any model or run whose weights can be plain; its classifier is not used.
        data: Whose training images are looked at, without their labels, where the spec measures anything.
        folder: Not there yet, or empty.
        seed: Decides which of the images.

    Raises:
        RemapError: A mistake in the names or the shape, no readable images, no place to write, or several processes.
    """
    _require_one_process()
    require_free(folder)  # now, not once everything is measured
    seed = checked(Recipe, {"seed": seed}, "shrink").seed
    return _cut(teacher, spec, data, folder, seed, progress, SharedResources())


def _cut(
    teacher: ModelSpec,
    spec: ShrinkSpec,
    data: DataSpec,
    folder: Path,
    seed: int,
    progress: Progress,
    shared: SharedResources,
) -> Shrunk:
    # The classifier is not used: one row is the smallest.
    backbone = open_backbone(teacher, 1)
    # A shape that cannot be is refused before any image is read.
    target_shape(backbone, spec)
    backbone.model.to(accelerator().device)
    batches: Callable[[], Iterator[Tensor]] = _no_images
    if spec.needs_images:
        without_images = "importance=magnitude, blocks=uniform"
        batches = training_pixels(
            backbone, data, seed, shared, images=spec.images, batch_size=_BATCH, without_images=without_images
        )
    with progress.wait("cutting the student from the teacher"):
        return shrink(backbone, spec, batches, folder)


def _require_one_process() -> None:
    require_one_process("a model is cut in one process", "call remap shrink without a launcher")


def _no_images() -> Iterator[Tensor]:
    return iter(())


def shrunk_text(shrunk: Shrunk) -> str:
    """Return in one line what was cut."""
    pairs = zip(vars(shrunk.before).items(), vars(shrunk.after).values(), strict=True)
    shape = ", ".join(f"{name} {one} -> {other}" if one != other else f"{name} {one}" for (name, one), other in pairs)
    before, after = (f"{number / 1e6:.2f} M" for number in shrunk.parameters)
    blocks = ""
    if len(shrunk.kept) < shrunk.before.depth:
        blocks = f"; blocks {', '.join(map(str, shrunk.kept))} stay"
    return f"{shape}; {before} -> {after} parameters{blocks}"


def take_out_skipped(run: Path, folder: Path, threshold: float) -> tuple[list[int], list[float]]:
    """Take the blocks that a run of ``skip`` closed out of its student, and write the rest as a model folder of timm.

    Args:
        threshold: Blocks go whose gates are at or below it.

    Returns:
        The blocks that stay, and the gate of every block.

    Raises:
        RemapError: It is no run of ``skip``, what is left cannot be written, or there are several processes.
    """
    _require_one_process()
    if not is_run(str(run)):
        raise BackboneError(f"{run} is not a finished run", do="name a run directory of --method skip")
    network, _ = load_task(run)
    openness = gates_of(network.attached).openness()
    with torch.no_grad():
        kept = save_remaining(network.attached, folder, threshold, network.classes or ())
    return kept, openness
