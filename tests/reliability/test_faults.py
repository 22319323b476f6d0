"""Numbers that are not finite, and memory that runs out. Expected: weights before the step, an undisturbed twin."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from remap.data.batches import Batch
from remap.data.images import BadImage, decode
from remap.engine import loop, non_finite, step
from remap.engine.job import Job, StudentStep
from remap.engine.non_finite import MAX_RECOVERIES, all_finite
from remap.engine.step import Sums
from remap.engine.teacher import Teacher
from remap.engine.training import Training
from remap.errors import DiskFull, TrainingError
from remap.network import Runner
from remap.pipeline import one_pass
from remap.pipeline.run import resume, start
from remap.remapping.objective import Objective
from remap.runs.run_dir import RunDir
from remap.tuning.attached import Attached

pytestmark = pytest.mark.slow

NAN, INFINITE = float("nan"), float("inf")
# A teacher that is asked in every step, and a checkpoint after every step.
WATCHED = ("train.checkpoint_seconds=0", "data.augment=shift")
WORKER = Path(__file__).parent / "workers" / "faults.py"


class Poison:
    """Puts a value into one place at chosen steps (counted over the run from 1)."""

    def __init__(self, place: str, value: float, steps: range) -> None:
        self.place, self.value, self.steps, self.step = place, value, steps, 0
        self.attempts = 0  # of the chosen steps

    def install(self, patch: pytest.MonkeyPatch) -> None:
        forward, items, attempt = Objective.forward, Teacher.items, loop.forward_backward
        update = torch.optim.AdamW.step

        def poisoned_loss(objective: Objective, student: Any, *rest: Any) -> Any:
            total, parts = forward(objective, student, *rest)
            if self._now("gradient"):
                total.register_hook(lambda gradient: gradient * self.value)
            return (total * self.value if self._now("loss") else total), parts

        def poisoned_items(teacher: Teacher, images: Tensor) -> dict[str, Tensor]:
            found = items(teacher, images)
            if self._now("teacher"):
                next(iter(found.values()))[0].fill_(self.value)
            return found

        def counted(training: Training, number: int) -> Sums:
            self.step += 1
            self.attempts += self.step in self.steps
            return attempt(training, number)

        def watched(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
            assert self.step not in self.steps, "it was not noticed in the same step: it was stepped"
            return update(optimizer, *arguments)

        patch.setattr(Objective, "forward", poisoned_loss)
        patch.setattr(Teacher, "items", poisoned_items)
        patch.setattr(loop, "forward_backward", counted)
        patch.setattr(torch.optim.AdamW, "step", watched)

    def _now(self, place: str) -> bool:
        return place == self.place and self.step in self.steps


PLACES = [(place, value) for place in ("loss", "gradient", "teacher") for value in (NAN, INFINITE)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(number: float, dtype: torch.dtype) -> None:
    ends = torch.finfo(dtype)
    fine = [
        torch.tensor([ends.min, ends.max, 0.0], dtype=dtype),
        torch.tensor(1.0, dtype=dtype),
        torch.zeros(0),
        torch.tensor(7),
    ]
    assert all_finite(fine) and all_finite([])
    bad = torch.zeros(3, 5, dtype=dtype)
    bad[1, 2] = number
    assert not all_finite([*fine, bad]) and not all_finite([torch.tensor(number, dtype=dtype)])


@pytest.mark.guarantee(8)
@pytest.mark.parametrize(("place", "value"), PLACES)
def test_a_step_that_is_not_finite_is_skipped(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[..., Any],
    figure: Callable[..., None],
    place: str,
    value: float,
) -> None:
    """Two bad steps in a row: the first is skipped, the second also halves the learning rate."""
    progress, poison = watch(lambda done: None), Poison(place, value, range(2, 4))
    poison.install(monkeypatch)
    result = start(tiny.recipe(*WATCHED), tmp_path / "run", progress)
    assert poison.attempts == 2
    faults = [line for line in progress.said if "not finite" in line]
    named = {"loss": "the loss", "gradient": "the gradient", "teacher": "the teacher's output"}[place]
    assert len(faults) == 2 and all(line.startswith(named) for line in faults)
    assert "epoch 1, step 2" in faults[0] and "halved" not in faults[0]
    assert "epoch 1, step 3" in faults[1] and "halved" in faults[1]
    told = result.summary["faults"]
    assert told["skipped_steps"] == 2 and told["learning_rate_factor"] == 0.5
    written = list(_written(tmp_path / "run"))
    assert len(written) >= 3 and all(all_finite(load_file(path).values()) for path in written)
    figure("bad steps noticed at once, not stepped, not written", 2, 2)


@pytest.mark.guarantee(8)
def test_a_skipped_step_leaves_no_batch_statistics(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Callable[..., str],
    figure: Callable[..., None],
) -> None:
    """Two epochs of three steps, one with infinite activations: five steps are counted, all statistics are finite."""
    student = model_folder("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 32)
    poison, forward = Poison("activation", INFINITE, range(3, 4)), torch.nn.BatchNorm2d.forward

    def poisoned(norm: torch.nn.BatchNorm2d, images: Tensor) -> Tensor:
        return forward(norm, images * INFINITE if norm.training and poison._now("activation") else images)

    poison.install(monkeypatch)
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", poisoned)
    result = start(tiny.recipe(student=student, method="full", losses="ce", teacher=None), tmp_path / "run")
    assert poison.attempts == 1 and result.summary["faults"]["learning_rate_factor"] == 1.0
    norms = [module for module in result.student.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all(int(norm.num_batches_tracked) == 5 for norm in norms)
    assert all(all_finite([norm.running_mean, norm.running_var]) for norm in norms)
    figure("layers whose statistics a skipped step left unchanged", len(norms), len(norms))


@pytest.mark.guarantee(8)
@pytest.mark.parametrize("place", ["loss", "gradient", "teacher"])
def test_a_run_that_stays_bad_stops_with_the_images_in_hand(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
    largest_difference: Callable[..., float],
    place: str,
) -> None:
    """Expected: after the stop, a resumed run without the poison repeats the skipped steps of a poisoned one."""
    recipe, run = tiny.recipe(*WATCHED, "train.epochs=3"), tmp_path / "run"
    poison = Poison(place, NAN, range(3, 100))
    with monkeypatch.context() as patch:
        poison.install(patch)
        with pytest.raises(TrainingError, match="not finite in epoch 2, step 3") as caught:
            start(recipe, run)
    assert caught.value.exit_code == 2 and str(run / "fault") in (caught.value.do or "")
    assert poison.step == 3 + MAX_RECOVERIES and RunDir(run).status() == "failed"
    told = json.loads((run / "fault" / "fault.json").read_text())
    batch = load_file(run / "fault" / "batch-0.safetensors")
    assert (told["epoch"], told["step"], len(told["images"])) == (2, 3, 8)
    assert batch["images"].shape == (8, 3, 16, 16) and batch["images"].dtype == torch.uint8
    names = [name.split("/")[1] for name in told["images"]]  # the pictures' own class folders
    assert names == [("blue", "green", "red")[label] for label in batch["labels"].tolist()]
    assert all(all_finite(load_file(path).values()) for path in _written(run))
    assert resume(run).summary["faults"]["skipped_steps"] == MAX_RECOVERIES
    figure("recoveries before the run stops", MAX_RECOVERIES)


@pytest.mark.guarantee(8)
def test_a_pixel_that_is_no_number_makes_an_unreadable_image(tmp_path: Path, figure: Callable[..., None]) -> None:
    for value in (NAN, INFINITE):
        pixels = np.zeros((16, 16), dtype=np.float32)
        pixels[3, 5] = value
        Image.fromarray(pixels).save(tmp_path / "bad.tif")
        with pytest.raises(BadImage, match="not finite"):
            decode(tmp_path / "bad.tif")
    figure("images with a pixel that is not finite, refused", 2, 2)


def test_weights_that_broke_go_back_to_the_last_checkpoint(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]
) -> None:
    """An update that overflows leaves nothing to go on with; half the learning rate is tried from the checkpoint."""
    progress, step, calls = watch(lambda done: None), torch.optim.AdamW.step, [0]

    def overflow(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        found = step(optimizer, *args)
        calls[0] += 1
        if calls[0] == 3:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(INFINITE)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    result = start(tiny.recipe("train.checkpoint_seconds=0"), tmp_path / "run", progress)
    back = [line for line in progress.said if line.startswith("back to the checkpoint of epoch 1, step 2")]
    assert len(back) == 1 and "x 0.5" in back[0]
    assert result.summary["faults"]["learning_rate_factor"] == 0.5
    assert all(all_finite(load_file(path).values()) for path in _written(tmp_path / "run"))


@pytest.mark.guarantee(8)
@pytest.mark.parametrize("update", [2, 3], ids=["the last step of an epoch", "the first of the next"])
def test_weights_that_break_again_and_again_stop_the_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any], update: int
) -> None:
    """Steps that are done again after going back do not make the fault forgotten."""
    progress, after_step = watch(lambda done: None), Attached.after_step

    def overflow(attached: Attached, number: int, total: int) -> None:
        after_step(attached, number, total)
        if number == update:
            with torch.no_grad():
                attached.model.get_parameter(next(iter(attached.trainable))).fill_(INFINITE)

    monkeypatch.setattr(non_finite, "FORGET_AFTER", 1)
    monkeypatch.setattr(Attached, "after_step", overflow)
    # Inside an epoch the loss of the next step shows it first.
    told = {2: "the trained weights are not finite in epoch 1, step 3", 3: "the loss is not finite in epoch 2, step 2"}
    with pytest.raises(TrainingError, match=f"{told[update]}; 3 steps shortly before"):
        start(tiny.recipe("train.checkpoint_seconds=1000"), tmp_path / "run", progress)
    assert len([line for line in progress.said if line.startswith("back to")]) == MAX_RECOVERIES
    assert json.loads((tmp_path / "run" / "fault" / "fault.json").read_text())["step"] == {2: 3, 3: 2}[update]


def test_weights_that_are_broken_before_the_first_step_are_an_error(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Training.__init__

    def spoiled(training: Training, job: Job) -> None:
        create(training, job)
        with torch.no_grad():
            next(iter(training.parameters.values())).fill_(NAN)

    monkeypatch.setattr(Training, "__init__", spoiled)
    with pytest.raises(TrainingError, match="not finite before the first step"):
        start(tiny.recipe(), tmp_path / "run")


def test_a_full_disk_does_not_hide_the_fault(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise DiskFull("no room")

    Poison("loss", NAN, range(1, 100)).install(monkeypatch)
    monkeypatch.setattr(non_finite, "save", full)
    with pytest.raises(TrainingError, match="the loss is not finite") as caught:
        start(tiny.recipe(*WATCHED), tmp_path / "run")
    assert "could not be saved: no room" in str(caught.value)


@pytest.mark.parametrize("kind", [Teacher, one_pass._Headless])
def test_outputs_that_are_not_finite_are_not_kept(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: type[Teacher]
) -> None:
    """Neither in memory nor on disk, where every later run would read them; nor is a head fitted on such features."""
    if kind is Teacher:
        request.getfixturevalue("two_passes")
    items = kind.items

    def poisoned(teacher: Teacher, images: Tensor) -> dict[str, Tensor]:
        found = items(teacher, images)
        if len(images) == 8:  # not the one that asks for shapes
            next(iter(found.values()))[2, 0] = NAN
        return found

    monkeypatch.setattr(kind, "items", poisoned)
    monkeypatch.setenv("REMAP_CACHE", str(tmp_path / "cache"))
    for place in ("memory", "disk"):
        with pytest.raises(TrainingError, match="is not finite for 1 image") as caught:
            start(tiny.recipe(f"teacher.cache={place}"), tmp_path / place)
        assert "train/" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("REMAP_CACHE", str(tmp_path / "cache"))
    assert start(tiny.recipe("teacher.cache=disk"), tmp_path / "again").summary["student"]["accuracy"] >= 0


@pytest.mark.guarantee(9)
@pytest.mark.parametrize(("fits", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_micro_batches_are_halved_until_they_fit(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    largest_difference: Callable[..., float],
    figure: Callable[..., None],
    fits: int,
    accumulation: int,
) -> None:
    """Source: the run that had memory enough. Dropout and augmentation are on."""
    recipe = tiny.recipe("data.augment=shift_flip", losses="ce,kd,attention")
    twin = start(recipe, tmp_path / "twin")
    monkeypatch.setattr(StudentStep, "forward", _limited(StudentStep.forward, fits))
    result = start(recipe, tmp_path / "run")
    assert result.summary["faults"] == {
        "skipped_steps": 0,
        "learning_rate_factor": 1.0,
        "accumulation": accumulation,
    }
    difference = largest_difference(result.student.trained, twin.student.trained)
    assert difference < 1e-6
    figure("largest difference of weights after running out of memory", difference)


@pytest.mark.guarantee(9)
def test_memory_for_no_image_at_all_is_an_error(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = [0]

    def refuse(*arguments: Any) -> None:
        tries[0] += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StudentStep, "forward", refuse)
    with pytest.raises(TrainingError, match="out of memory, even with 8 micro-batches") as caught:
        start(tiny.recipe(), tmp_path / "run")
    assert tries[0] == 4 and "Tried to allocate" in str(caught.value)


@pytest.mark.guarantee(9)
def test_batch_statistics_of_an_attempt_that_failed_do_not_count(
    tiny: Any,
    model_folder: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[..., Any],
    largest_difference: Callable[..., float],
) -> None:
    """Memory runs out in the second micro-batch, behind batch norms. Source: as many micro-batches from the start."""
    student = model_folder("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 32)
    words = {"student": student, "method": "full", "losses": "ce"}
    twin = start(tiny.recipe("train.accumulation=4", **words), tmp_path / "twin")
    forward, calls, progress = StudentStep.forward, [0], watch(lambda done: None)

    def second_fails(step: StudentStep, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(step, *arguments)

    monkeypatch.setattr(StudentStep, "forward", second_fails)
    result = start(tiny.recipe("train.accumulation=2", **words), tmp_path / "run", progress)
    assert largest_difference(result.student.tensors, twin.student.tensors) == 0.0
    (told,) = [line for line in progress.said if line.startswith("out of memory")]
    assert "4 micro-batches" in told and "up to 2 images; that changes batch statistics" in told


def test_evaluation_takes_smaller_batches_when_memory_runs_out(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]
) -> None:
    """Source: the accuracy of the run that had memory enough."""
    recipe, progress = tiny.recipe(), watch(lambda done: None)
    twin = start(recipe, tmp_path / "twin")
    forward = Runner.forward

    def limited(runner: Runner, images: Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled() and len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(runner, images, *rest)

    monkeypatch.setattr(Runner, "forward", limited)
    result = start(recipe, tmp_path / "run", progress)
    assert any("in batches of 8" in line for line in progress.said)
    for name in ("correct", "accuracy", "initial_accuracy"):
        assert result.summary["student"][name] == twin.summary["student"][name]


@pytest.mark.guarantee(9)
def test_two_processes_recover_together(
    tiny: Any,
    tmp_path: Path,
    model_folder: Callable[..., str],
    watch: Callable[..., Any],
    fork_command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
) -> None:
    """What goes wrong on the second process alone, one run after the other (see workers/faults.py).

    Sources: one process with memory enough; one that skips the same step; one whose second micro-batch is empty; the
    run that was not stopped.
    """
    recipe, resnet = tiny.recipe(*WATCHED), {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(StudentStep, "forward", _limited(StudentStep.forward, 1))
        start(recipe, tmp_path / "halved", watch(_crash_at_step_4))
    arguments = [tiny.data, tiny.student, tiny.teacher, model_folder("resnet18", resnet, 32), str(tmp_path)]
    process = fork_command(str(WORKER), *arguments, count=2)
    expected = {"memory": start(recipe, tmp_path / "one")}
    expected["halved"] = expected["clocks"] = expected["memory"]
    with monkeypatch.context() as patch:
        Poison("loss", NAN, range(3, 4)).install(patch)
        expected["nan"] = start(recipe, tmp_path / "one-skipping")
    with monkeypatch.context() as patch:
        patch.setattr(step, "batches", _fourth_is_empty(step.batches))
        expected["unreadable"] = start(tiny.recipe(*WATCHED, "train.accumulation=2"), tmp_path / "one-unreadable")
    process.end()
    told = {name: json.loads((tmp_path / name / "summary.json").read_text())["faults"] for name in expected}
    assert told["memory"]["accumulation"] == 2 and told["nan"]["skipped_steps"] == 1
    assert told["halved"]["accumulation"] == 4, "two processes need half the micro-batches for the same memory"
    for name, result in expected.items():
        found = load_file(RunDir(tmp_path / name).task / "task.safetensors")
        difference = max(float((found[k] - t.detach()).abs().max()) for k, t in result.student.trained.items())
        assert difference < 1e-6, name
        figure("largest difference of weights, two processes recovering together", difference)
    again, whole = (RunDir(tmp_path / name).task / "task.safetensors" for name in ("average", "average-whole"))
    assert again.read_bytes() == whole.read_bytes(), "an average with batch statistics did not go on where it was"


def _without_images(batch: Batch) -> Batch:
    rows = {"images_BCHW": batch.images_BCHW[:0], "labels_B": batch.labels_B[:0]}
    return replace(batch, **rows, indices_B=batch.indices_B[:0], keys_B=batch.keys_B[:0])


def _crash_at_step_4(done: int) -> None:
    if done == 4:
        raise RuntimeError("power cut")


def _fourth_is_empty(batches: Callable[..., Iterator[Batch]]) -> Callable[..., Iterator[Batch]]:
    """The second half of the second step of the first epoch, whose images cannot be read."""

    def emptied(source: Any, plan: Any, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(batches(source, plan, epoch, first_step)):
            yield _without_images(batch) if epoch == 0 and number == 3 else batch

    return emptied


def _limited(forward: Callable[..., Any], images: int) -> Callable[..., Any]:
    """A device that holds so many images at once."""

    def limited(step: StudentStep, images_BCHW: Tensor, *rest: Any) -> Any:
        if len(images_BCHW) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(step, images_BCHW, *rest)

    return limited


def _written(run: Path) -> Iterator[Path]:
    yield from (path for path in run.rglob("*.safetensors") if "fault" not in path.parts)
