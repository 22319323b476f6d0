"""Labels only beside the student with a teacher: the same steps, the same student bits, and resumable."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from remap.data.sources import open_data
from remap.errors import DataError, Interrupted, RecipeError
from remap.pipeline.baseline import baseline_recipe
from remap.pipeline.labels_only import same_steps
from remap.pipeline.run import resume, run, start
from remap.pipeline.run_differences import compare
from remap.recipe import resolve
from remap.recipe.schema import TrainSpec
from remap.runs.run_dir import RunDir

Watch = Callable[..., Any]
# Two epochs of three steps with all labels; of one with the 8 that are left here.
FEW = ("data.labels=8",)


def task(run: Path) -> dict[str, Tensor]:
    return load_file(run / "task" / "task.safetensors")


@pytest.mark.parametrize(("settings", "epochs"), [((), 2), (FEW, 6)], ids=["all labels", "few labels"])
def test_it_is_the_run_without_teacher_for_as_many_steps(
    tiny: Any, tmp_path: Path, largest_difference: Callable, settings: tuple[str, ...], epochs: int
) -> None:
    run = start(tiny.recipe("baseline=true", "teacher.allow_weak=true", *settings), tmp_path / "run")
    found = run.summary["baseline"]
    assert (found["epochs"], list(found["losses"])) == (epochs, ["ce"])
    assert RunDir(tmp_path / "run").summary()["baseline"] == found
    # A run of `remap tune` with the same steps, and the run with a teacher without a baseline.
    words = dict(tiny.words(), losses="ce")
    del words["teacher"]
    last = ("train.warmup_epochs=" + str(0.5 * epochs / 2), f"train.epochs={epochs}")
    alone = start(resolve(words=words, settings=[*tiny.SETTINGS, *settings, *last]), tmp_path / "alone")
    assert largest_difference(task(tmp_path / "run" / "baseline"), task(alone.run_dir)) == 0.0
    plain = start(tiny.recipe("teacher.allow_weak=true", *settings), tmp_path / "plain")
    assert largest_difference(task(run.run_dir), task(plain.run_dir)) == 0.0
    assert "baseline" not in plain.summary and not (plain.run_dir / "baseline").exists()


@pytest.mark.parametrize("stop", [4, 9], ids=["student", "baseline"])
def test_it_resumes_to_the_same_bits(tiny: Any, tmp_path: Path, watch: Watch, stop: int) -> None:
    """Six steps are the student's, six more the baseline's."""
    recipe = tiny.recipe("baseline=true", "teacher.allow_weak=true")
    first = start(recipe, tmp_path / "first").run_dir

    def interrupt(step: int) -> None:
        if step == stop:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"resume with: remap distill --resume {tmp_path / 'run'}"):
        start(recipe, tmp_path / "run", watch(interrupt))
    assert (tmp_path / "run" / "summary.json").is_file() == (stop > 6)  # the student's results come first
    resume(tmp_path / "run")
    found = compare(RunDir(first), RunDir(tmp_path / "run"))
    assert found["equal"], found
    assert "accuracy by labels alone" in {check["what"] for check in found["checks"]}
    assert task(first / "baseline").keys() == task(tmp_path / "run" / "baseline").keys()


def test_as_many_steps_are_counted_in_whole_numbers() -> None:
    """100 epochs of 11 steps are 110 of 10, though 100 * 1.1 is above 110 in floating point."""
    assert same_steps(TrainSpec(epochs=100, batch_size=10), 110, 100).epochs == 110


def test_a_run_without_a_teacher_has_none(tiny: Any) -> None:
    with pytest.raises(RecipeError, match="baseline: a run without a teacher"):
        tiny.recipe("baseline=true", "teacher=null", losses="ce")


def test_a_baseline_that_fails_leaves_a_finished_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is written before; the baseline here has metrics without the checkpoints they belong to."""

    def damaged(components: Any, progress: Any) -> Any:
        alone = baseline_recipe(components, progress)
        (RunDir.create(tmp_path / "run" / "baseline", alone).path / "metrics.jsonl").touch()
        return alone

    monkeypatch.setattr("remap.pipeline.run.baseline_recipe", damaged)
    run = start(tiny.recipe("baseline=true", "teacher.allow_weak=true"), tmp_path / "run")
    assert "baseline" not in run.summary and RunDir(tmp_path / "run").is_done


def test_a_baseline_whose_images_cannot_be_read_leaves_a_finished_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where they are lost while the student trains."""

    def train(recipe: Any, run_dir: RunDir, *rest: Any, **options: Any) -> Any:
        if run_dir.path.name == "baseline":
            raise DataError("no image of the step can be read")
        return run(recipe, run_dir, *rest, **options)

    monkeypatch.setattr("remap.pipeline.run.run", train)
    found = start(tiny.recipe("baseline=true", "teacher.allow_weak=true"), tmp_path / "run")
    assert "baseline" not in found.summary and RunDir(tmp_path / "run").is_done


def test_what_is_known_of_the_images_is_said_once(tiny: Any, tmp_path: Path, watch: Watch) -> None:
    """Of the 9 images that keep their label one is broken."""
    shutil.copytree(tiny.data, tmp_path / "data")
    labeled = open_data(str(tmp_path / "data"), None, 0.2, labels=9).train
    (tmp_path / "data" / labeled.names[0]).write_bytes(b"text")
    (tmp_path / "data" / "train" / "red" / "notes.gif").write_bytes(b"GIF89a")
    progress = watch(lambda _step: None)
    settings = ("baseline=true", "teacher.allow_weak=true", "data.max_bad=0.5", "data.labels=9", "train.epochs=1")
    start(tiny.recipe(*settings, data=str(tmp_path / "data")), tmp_path / "run", progress)
    for text in ("1 image that cannot be read", "left out 1 other file:", "8 of the 9 labels that were chosen"):
        assert sum(text in line for line in progress.said) == 1, progress.said
