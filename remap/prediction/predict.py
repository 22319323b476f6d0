"""Predict images with a tuned student, or with several tasks on one backbone."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from remap.data import CLASSES
from remap.distributed import launcher_env
from remap.distributed.launch import accelerator, use_bf16
from remap.errors import BackboneError, DataError, RunError
from remap.io.paths import expanded
from remap.pipeline.student_api import Student, load_student
from remap.prediction.formats import require_writable
from remap.prediction.inputs import STDIN, Inputs, Item
from remap.prediction.output import PredictionFile
from remap.prediction.predictions import Prediction, Wanted, predictions
from remap.progress import Progress, Silent
from remap.runs.run_dir import RunDir
from remap.runs.task_file import folder_of, read_meta
from remap.tasks.multi_task import MultiTask
from remap.tasks.shelf import Shelf

# A run directory, task folder or shelf; or several runs and task folders on one backbone, by name.
Runs = str | Path | Mapping[str, str | Path]


def predict(
    run: Runs,
    images: str | Path | Iterable[str | Path],
    *,
    top: int | None = None,
    threshold: float | None = None,
    probabilities: bool = False,
    embeddings: bool = False,
    batch_size: int = 64,
    adapt: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    progress: Progress = Silent(),
) -> Iterator[Prediction]:
    """Yield a row for each image as soon as it is computed; for several tasks, one for each task and image.

        for row in remap.predict("runs/birds-vpt_deep-001", "photos/", top=3):
            print(row.path, row.top or row.error)

    Memory does not grow with the number of images.

    Args:
        run: A run directory, a task folder, or a shelf (its current task); or several runs on one backbone by name.
        images: Files, folders, tars, zips, patterns such as ``"photos/**/*.jpg"``; or an iterable of these.
        top: Classes of a row, the likeliest first; None is one, and of a student of task multilabel all that are as
            likely as ``threshold``.
        threshold: Of that task; None is 0.5.
        probabilities: Let rows hold the probabilities of all classes.
        embeddings: Let rows hold what the classifier is given (pooled features).
        batch_size: Images per forward pass.
        adapt: "tent" adapts the student to these images while predicting (``remap.prediction.tent``); rows then depend
            on the order of the images and on ``batch_size``. The run stays as it is.
        precision: "fp32", "bf16", or "auto": bfloat16 where the device computes in it. None is that of the run's
            recipe, and auto for task folders, shelves and several runs.
        device: Where to compute; None is the accelerator if there is one, else the CPU.

    Raises:
        RunError: The run's files are damaged, or the runs are on different backbones.
        DataError: There is no image, or a folder or archive cannot be read. An image that cannot be read is a row.
    """
    wanted = Wanted(top, probabilities, embeddings, batch_size, precision=precision, adapt=adapt, threshold=threshold)
    words = _named(images)
    students = open_students(run, device)
    wanted = in_precision_of(run, students, wanted)
    inputs = Inputs(words)
    for rows in _with_progress(students, inputs, wanted, progress):
        yield from rows


def _named(images: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """Return names of images as a list.

    Raises:
        DataError: They are not names.
    """
    words = list(images) if isinstance(images, Iterable) and not isinstance(images, str) else [images]
    if wrong := [word for word in words if not isinstance(word, str | Path)]:
        raise DataError(
            "predict reads images by their names",
            given=type(wrong[0]).__name__,
            allowed="files, folders, archives, patterns",
            do="give pictures in memory to a student: remap.load_student(RUN).predict(images)",
        )
    return words


def predict_to_file(
    run: Runs, inputs: Inputs, path: Path, wanted: Wanted, progress: Progress
) -> tuple[int, int] | None:
    """Write a row for each image and task to a JSONL, CSV or Parquet file.

    The images are shared among the processes of a launcher. Killed and given again, it continues.

    Returns:
        Number of images, and of those that could not be read; None on all processes but the first.

    Raises:
        RunError: The file is there already or cannot be written, or was begun with other options or images.
    """
    path = expanded(path)
    require_writable(path)  # before anything is loaded
    several = launcher_env.number("WORLD_SIZE", 1) > 1
    process, processes = (accelerator().process_index, accelerator().num_processes) if several else (0, 1)
    if several and STDIN in inputs.words:
        raise RunError("standard input cannot be shared among processes", do="write the paths to a file: --list FILE")
    if wanted.adapt and (several or path.with_name(f"{path.name}.parts").exists()):
        raise RunError(
            "what adapts to the images before cannot be shared among processes, nor continued after a kill",
            given=f"adapt={wanted.adapt}",
            do=f"use one process, and remove {path}.parts if it is there",
        )
    students = open_students(run, accelerator().device if several else None)
    wanted.require_fit(students)  # before the folder is made, which other options would not continue
    wanted = in_precision_of(run, students, wanted)
    silent = {"workers", "precision", *(() if wanted.adapt else ("batch_size", "adapt"))}
    silent |= {name for name in ("top", "threshold") if getattr(wanted, name) is None}
    settings = {"tasks": _digests(run), **{key: value for key, value in asdict(wanted).items() if key not in silent}}
    if wanted.precision == "bf16":
        settings["bf16"] = True
    if wanted.top is None and all(student.network.task == CLASSES for student in students.values()):
        settings["top"] = 1
    make = partial(PredictionFile, path, settings, process, processes, alone=True)
    file = make() if process == 0 else None
    if several:
        accelerator().wait_for_everyone()  # until the folder is there
    with closing(file or make()) as file:
        file.predict(inputs, lambda items: _with_progress(students, items, wanted, progress))
        if process > 0:
            return None
        counts = file.merge({name: student.classes for name, student in students.items()})
    inputs.left_out += file.left_out
    return counts


def open_students(run: Runs, device: Any = None) -> dict[str, Student]:
    """Return the students by name of the task; a single one has the empty name."""
    if isinstance(run, Mapping):
        return dict(MultiTask(None, run, device).students)
    if Shelf.is_at(run):
        return {"": Shelf(run).open_current(device)}
    return {"": _folded(load_student(run, device))}


def _folded(student: Student) -> Student:
    """Fold the method into the weights where it can be: LoRA then costs nothing, and logits differ by about 1e-6."""
    if student.network.attached.mergeable:
        with suppress(BackboneError):  # one that these weights do not allow: nothing was written
            student.network.attached.merge()
    return student


def in_precision_of(run: Runs, students: Mapping[str, Student], wanted: Wanted) -> Wanted:
    """Return the options with "fp32" or "bf16", which the recipe of a run and the device decide where none is named."""
    precision = wanted.precision
    if precision is None:
        precision = "auto"
        if not isinstance(run, Mapping) and (expanded(run) / "recipe.yaml").is_file():
            precision = RunDir(expanded(run)).recipe().train.precision
    device = next(iter(students.values())).device
    return replace(wanted, precision="bf16" if use_bf16(precision, device) else "fp32")


def _digests(run: Runs) -> dict[str, str]:
    """Return the hash of each task's tensors, which decide the rows."""
    if isinstance(run, Mapping):
        return {name: read_meta(folder_of(expanded(path))).sha256 for name, path in run.items()}
    path = Shelf(run).current_folder if Shelf.is_at(run) else expanded(run)
    return {"": read_meta(folder_of(path)).sha256}


def _with_progress(
    students: Mapping[str, Student], items: Iterable[Item], wanted: Wanted, progress: Progress
) -> Iterator[list[Prediction]]:
    with progress.wait("predicting") as step:
        for rows in predictions(students, items, wanted):
            yield rows
            step.advance()
