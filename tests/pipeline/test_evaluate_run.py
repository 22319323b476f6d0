"""A run evaluated again: what it says when the images are not those of the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from remap.data.fingerprint import Contents
from remap.data.splits import Split
from remap.errors import RecipeError
from remap.exporting.task_source import DRAWN, TaskSource
from remap.pipeline.evaluate_run import evaluate_run
from remap.pipeline.repeat import repeat
from remap.pipeline.run import resume, start
from remap.progress import Silent
from remap.report.run_report import report_run
from remap.runs.run_dir import RunDir

Watch = Callable[..., Any]


@pytest.mark.parametrize("memory", [0, 4])
def test_other_evaluation_images_are_said(tiny: Any, tmp_path: Path, watch: Watch, memory: int) -> None:
    """The 9 images of the fixture: one less, then another one in its place. A training image changes nothing."""
    shutil.copytree(tiny.data, tmp_path / "data")
    image, training = (tmp_path / "data" / split / "red" / "00.png" for split in ("val", "train"))
    settings = (f"data.memory_gib={memory}", "teacher.cache=off", "train.epochs=1", "train.warmup_epochs=0")
    run = start(tiny.recipe(*settings, data=str(tmp_path / "data")), tmp_path / "run").run_dir

    def said(data: str | None = None) -> list[str]:
        progress = watch(lambda done: None)
        evaluate_run(run, data, False, progress)
        return [line for line in progress.said if "not those of the run" in line]

    training.unlink()
    assert said() == []
    content = image.read_bytes()
    image.unlink()
    (line,) = said()
    assert "(8 now, 9 then)" in line and said(str(tmp_path / "data" / "val")) == [], "others were asked for"
    image.write_bytes((image.with_name("01.png")).read_bytes())
    (line,) = said()
    assert "(9 now, 9 then)" in line
    image.write_bytes(content)
    assert said() == []
    (run / "summary.json").unlink()
    assert said() == []


def test_the_folder_of_a_run_in_a_new_place_is_said_to_hold_what_it_learned_from(
    tiny: Any, tmp_path: Path, watch: Watch
) -> None:
    """The fixture has 24 images to learn from and 9 to evaluate on; the latter alone are held out."""
    settings = ("teacher.cache=off", "train.epochs=1", "train.warmup_epochs=0")
    run = start(tiny.recipe(*settings), tmp_path / "run").run_dir
    moved = Path(shutil.copytree(tiny.data, tmp_path / "moved"))

    def said(data: Path) -> list[str]:
        progress = watch(lambda done: None)
        evaluate_run(run, str(data), False, progress)
        return [line for line in progress.said if "learned from those" in line]

    (line,) = said(moved)
    assert "holds 9 images with the names of the run's evaluation images, and 24 others:" in line
    assert said(moved / "val") == []
    next((moved / "val").rglob("*.png")).unlink()
    assert said(moved) == [], "not the run's folder"


def test_images_that_a_fold_holds_out_are_evaluated_and_exported_again(tiny: Any, tmp_path: Path, watch: Watch) -> None:
    settings = ("data.fold={number: 1, of: 2, held_out: 0.25}", "train.epochs=1", "train.warmup_epochs=0")
    run = start(tiny.recipe(*settings, losses="ce", teacher=None), tmp_path / "run")
    progress = watch(lambda done: None)
    found = evaluate_run(run.run_dir, None, False, progress)
    assert found["images"] == run.summary["data"]["val_images"] == 3, "a quarter of the 12 that are not in the fold"
    assert found["correct"] == run.summary["student"]["correct"]
    assert not any("not those of the run" in line for line in progress.said)
    assert TaskSource(run.run_dir).images(DRAWN).what.startswith("3 evaluation images")


def test_a_finished_run_is_read_whose_recipe_is_refused_now(tiny: Any, tmp_path: Path) -> None:
    """Earlier versions took a temperature that warms up from 0, and a rate that rises to min_lr."""
    run = start(tiny.recipe("teacher.cache=off", "train.epochs=1", "train.warmup_epochs=0"), tmp_path / "run").run_dir
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (kd,) = (loss for loss in recipe["losses"] if loss["name"] == "kd")
    kd["temperature_schedule"] = {"warmup_epochs": 1.0}
    recipe["train"] |= {"lr": 1e-4, "min_lr": 1e-3}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert evaluate_run(run, None, False, Silent())["images"] == 9
    assert report_run(RunDir.open(run)).is_file()
    with pytest.raises(RecipeError, match="a temperature cannot be 0"):
        repeat(run)
    (run / "status.json").write_text('{"status": "stopped"}')
    with pytest.raises(RecipeError, match="a temperature cannot be 0"):
        resume(run)


# One of two processes, in batches of two images; notes which it has read, and which are said to be skipped.
READER = """
import json, os, sys
from pathlib import Path
from remap.data.fingerprint import Contents
from remap.progress import Silent
from remap.pipeline import evaluate_run

run, read, look = Path(sys.argv[1]), [], Contents.read
Contents.read = lambda contents, index: read.append(index) or look(contents, index)
evaluate_run.batch_size_of_evaluation = lambda recipe: 2
found = evaluate_run.evaluate_run(run, None, True, Silent())
(run / f"read-{os.environ['RANK']}").write_text(json.dumps([sorted(read), found["skipped"]]))
"""


@pytest.mark.parametrize("memory", ["8", "0"])
def test_images_that_are_left_out_are_named_and_not_counted(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any], memory: str
) -> None:
    """Of 24 and 9 images of the fixture one each cannot be read: found before training, or on the way."""
    shutil.copytree(tiny.data, tmp_path / "data")
    for name in ("train/red/00.png", "val/red/00.png"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    progress = watch(lambda step: None)
    settings = (f"data.memory_gib={memory}", "data.skip_bad=true", "train.epochs=1")
    summary = start(tiny.recipe(*settings, data=str(tmp_path / "data")), tmp_path / "run", progress).summary
    data, student = summary["data"], summary["student"]
    assert (data["train_images"], data["labeled_images"], data["val_images"]) == (23, 23, 8)
    assert [name for name, _ in data["skipped"]] == ["train/red/00.png", "val/red/00.png"]
    assert student["accuracy"] == student["correct"] / 8
    said = [line for line in progress.said if "val/red/00.png (not an image)" in line]
    assert len(said) == 1


@pytest.mark.slow
def test_no_process_reads_the_images_of_the_others_again(
    tiny: Any, tmp_path: Path, fork_command: Callable[..., Any]
) -> None:
    """Where they do not fit in memory: each of the 9 of the fixture is read once. The seventh is the second process's,
    and no image any more; all say so.
    """
    shutil.copytree(tiny.data, tmp_path / "data")
    settings = ("data.memory_gib=0", "train.epochs=1", "teacher.cache=off")
    run = start(tiny.recipe(*settings, data=str(tmp_path / "data")), tmp_path / "run").run_dir
    (tmp_path / "data" / "val" / "red" / "00.png").write_bytes(b"no image")
    (tmp_path / "reader.py").write_text(READER)
    fork_command(str(tmp_path / "reader.py"), str(run), count=2).end()
    (first, skipped), (second, told) = (json.loads((run / f"read-{rank}").read_text()) for rank in range(2))
    assert (first, second) == ([0, 1, 4, 5, 8], [2, 3, 6, 7])
    assert skipped == told and [Path(name).name for name, _ in skipped] == ["00.png"]


def test_what_is_learnt_of_other_processes_is_not_read() -> None:
    """Four images, two read by each of two: then no more reads, and the fingerprint of one that read them all."""
    read: list[int] = []
    split = Split(tuple("abcd"), np.array([0, 1, 0, 1]), lambda index: read.append(index) or bytes([index]))
    one, other, whole = Contents(split), Contents(split), Contents(split)
    one.of([0, 2])
    other.of([3, 1])
    one.learn(*other.known())
    read.clear()
    found = one.fingerprint(Silent(), "images")
    assert read == [] and found == whole.fingerprint(Silent(), "images")
