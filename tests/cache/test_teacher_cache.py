"""Teacher outputs and frozen features that processes compute together. Source: one process with two micro-batches."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from remap.cache import passes
from remap.cache.passes import run_in_passes
from remap.data import batches
from remap.data.fingerprint import Contents
from remap.data.splits import Split
from remap.engine.teacher import Teacher
from remap.errors import DataError
from remap.pipeline import training_job
from remap.pipeline.run import resume, start

WORKER = Path(__file__).parent / "workers" / "teacher_cache.py"
IMAGES = 24
# Outputs fit in memory, images do not, so unreadable ones are found on the way.
SHORT_OF_MEMORY = "data.memory_gib=1e-5"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("data.augment=shift", "data.views=2"), {"method": "lora", "losses": "ce,kd"}),
        ((), {"method": "linear", "losses": "ce,kd"}),
    ],
    ids=["two views", "frozen features"],
)
@pytest.mark.slow
def test_two_processes_compute_a_share_each_and_hold_all(
    tiny: Any, tmp_path: Path, fork_command: Callable[..., Any], settings: tuple[str, ...], words: dict[str, str]
) -> None:
    """Shares of micro-batches of 4: 12 of 24 images each, less the broken one, which both know of in the end."""
    shutil.copytree(tiny.data, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "train").glob("*/*.png"))[5]
    broken.write_bytes(broken.read_bytes()[:200])
    words = {**tiny.words(**words), "data": str(tmp_path / "data")}
    settings = (*tiny.SETTINGS, *settings, SHORT_OF_MEMORY, "data.max_bad=0.2", "teacher.allow_weak=true")
    work = {1: (*settings, "train.accumulation=2"), 2: settings}
    for count, each in work.items():
        arguments = json.dumps([count, str(tmp_path / "run" / str(count)), words, each])
        fork_command(str(WORKER), arguments, count=count).end()
    one, first, second = (_noted(tmp_path / "run", count, rank) for count, rank in ((1, 0), (2, 0), (2, 1)))
    views = 2 if "data.views=2" in settings else 1
    assert one[0]["asked"] == first[0]["asked"] + second[0]["asked"] == views * (IMAGES - 1)
    assert abs(first[0]["asked"] - second[0]["asked"]) == views
    assert one[0]["bad"] == first[0]["bad"] == second[0]["bad"] == [5]
    assert one[0]["summary"] == first[0]["summary"] == [str(broken.relative_to(tmp_path / "data"))]
    assert ("feature" in str(list(one[1]))) == (words["method"] == "linear")
    for held in (first[1], second[1]):
        assert held.keys() == one[1].keys()
        assert all(torch.equal(held[name], one[1][name]) for name in held)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "count"), [((5,), 3), ((5,), 9), ((3, 2, 2), 9), ((5,), 8)])
def test_passes_have_one_size_and_rows_stay_in_order(shape: tuple[int, ...], count: int) -> None:
    """Of images, and of features, which have no height and width."""
    rows, sizes = torch.arange(count * 20.0).reshape(count, 20)[:, : torch.Size(shape).numel()].reshape(-1, *shape), []
    made = run_in_passes(lambda part: {"twice": (sizes.append(len(part)), part * 2)[1]}, rows, 4)
    assert torch.equal(made["twice"], rows * 2) and set(sizes) == {4}


@pytest.mark.usefixtures("two_passes")
def test_outputs_are_computed_in_parts_where_memory_runs_out(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_difference: Callable[..., float]
) -> None:
    """The student is that of a teacher with memory enough, to the rounding of another batch shape."""
    plain = start(tiny.recipe(), tmp_path / "plain")
    items, sizes = Teacher.items, []

    def short(teacher: Teacher, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(images_BCHW))
        if len(images_BCHW) > 3:
            raise torch.OutOfMemoryError("no more than three images")
        return items(teacher, images_BCHW)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "items", short)
        parts = start(tiny.recipe(), tmp_path / "parts")
    assert sizes[:4] == [1, 8, 4, 2] and set(sizes[4:]) == {2}, "halved until it fits, and kept at that"
    assert largest_difference(plain.student.tensors, parts.student.tensors) < 1e-4

    monkeypatch.setattr(passes, "is_sharded", lambda network: True)
    monkeypatch.setattr(Teacher, "items", short)
    with pytest.raises(Exception, match="out of memory"):
        start(tiny.recipe(), tmp_path / "sharded")


@pytest.mark.usefixtures("two_passes")
def test_an_image_that_had_no_outputs_is_no_lesson_without_them(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest_difference: Callable[..., float]
) -> None:
    """One that could not be read for a moment. Expected after the resume: the run of a sound disk."""
    recipe = tiny.recipe(SHORT_OF_MEMORY, "data.max_bad=0.2", "teacher.cache=memory")
    kept, read = training_job.teachers_in_training, Contents.read

    def missed(contents: Contents, index: int) -> bytes:
        if contents.split.names[index].endswith("train/green/03.png"):
            raise FileNotFoundError(2, "No such file or directory")
        return read(contents, index)

    def keeping_with_one_missed(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Contents, "read", missed)
            return kept(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training_job, "teachers_in_training", keeping_with_one_missed)
        with pytest.raises(DataError, match="1 image without teacher outputs: not readable.*\n.*--resume"):
            start(recipe, tmp_path / "run")
    found, sound = resume(tmp_path / "run"), start(recipe, tmp_path / "sound")
    assert largest_difference(found.student.tensors, sound.student.tensors) == 0


@pytest.mark.parametrize("place", ["bytes", "batch"])
def test_what_the_machine_lacks_is_no_fault_of_an_image(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[..., Any],
    largest_difference: Callable[..., float],
    place: str,
) -> None:
    """No more open files: the run says so. No more memory for a batch: smaller ones, and the student is the same."""
    recipe, progress = tiny.recipe(SHORT_OF_MEMORY, "data.augment=shift"), watch(lambda done: None)
    sound = start(recipe, tmp_path / "sound")
    opened, made = Contents.__init__, batches._make

    def short_of_files(contents: Contents, split: Split, workers: int | None = None) -> None:
        def read(index: int) -> bytes:
            if progress.steps >= 2:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return split.read(index)

        opened(contents, replace(split, read=read), workers)

    def short_of_memory(source: Any, plan: Any, epoch: int, pair: Any) -> Any:
        if len(pair[0]) > 4:
            raise MemoryError("Unable to allocate 3.00 MiB for an array")
        return made(source, plan, epoch, pair)

    if place == "bytes":
        monkeypatch.setattr(Contents, "__init__", short_of_files)
        with pytest.raises(DataError, match="images cannot be read: Too many open files\n(.*\n)+.*ulimit -n"):
            start(recipe, tmp_path / "run", progress)
        return
    monkeypatch.setattr(batches, "_make", short_of_memory)
    run = start(recipe, tmp_path / "run", progress)
    assert run.summary["faults"]["accumulation"] == 2 and any("out of memory" in line for line in progress.said)
    assert largest_difference(run.student.tensors, sound.student.tensors) < 1e-4


def _noted(run: Path, count: int, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    stem = f"{run / str(count)}-{count}-{rank}"
    return json.loads(Path(f"{stem}.json").read_text()), load_file(f"{stem}.safetensors")
