"""A run that goes on: with which images, where it says to be, and what is recorded of the machine it goes on with."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.errors import Interrupted, RunError
from remap.io.sealed_json import sealed_text
from remap.pipeline.computed_once import judged_once
from remap.pipeline.run import resume, start
from remap.pipeline.run_differences import changed_on_the_way
from remap.recipe import dump, load
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task

pytestmark = pytest.mark.slow

Watch = Callable[..., Any]


@pytest.fixture
def stopped(tiny: Any, tmp_path: Path, watch: Watch) -> RunDir:
    """A run of two epochs of three steps on images of its own, stopped after step 4."""

    def stop(done: int) -> None:
        if done == 4:
            signal.raise_signal(signal.SIGTERM)

    shutil.copytree(tiny.data, tmp_path / "data")
    with pytest.raises(Interrupted):
        start(tiny.recipe(data=str(tmp_path / "data")), tmp_path / "run", watch(stop))
    return RunDir(tmp_path / "run")


def test_a_resume_that_is_refused_leaves_no_record_of_its_machine(stopped: RunDir, tmp_path: Path) -> None:
    """An image is gone, then the checkpoints are; with other threads each time, of which no step was made."""
    image, threads = tmp_path / "data" / "train" / "red" / "00.png", torch.get_num_threads()
    content = image.read_bytes()
    try:
        torch.set_num_threads(threads + 1)
        image.unlink()
        with pytest.raises(RunError, match="the images are not those"):
            resume(stopped.path)
        image.write_bytes(content)
        stopped.checkpoint.rename(tmp_path / "aside")
        with pytest.raises(RunError, match="are gone"):
            resume(stopped.path)
        (tmp_path / "aside").rename(stopped.checkpoint)
        assert "resumed" not in stopped.environment()
        resume(stopped.path)
    finally:
        torch.set_num_threads(threads)
    assert [leg["threads"] for leg in stopped.environment()["resumed"]] == [threads + 1], "this one was accepted"
    assert changed_on_the_way(stopped) == [f"a different number of threads ({threads}, then {threads + 1})"]


def test_a_run_without_a_checkpoint_records_where_it_goes_on(tiny: Any, tmp_path: Path) -> None:
    """Killed before its first step: what it then makes is made here."""
    run = RunDir.create(tmp_path / "run", tiny.recipe())
    run.note_machine({"threads": 77}, resuming=False)
    resume(run.path)
    assert [leg["threads"] for leg in run.environment()["resumed"]] == [torch.get_num_threads()]


def test_a_run_that_was_killed_before_it_began_did_not_go_on(tiny: Any, tmp_path: Path) -> None:
    """Nothing of it was made where it was created; nor does the run that tunes a teacher go on where it was made."""
    run = RunDir.create(tmp_path / "run", tiny.recipe("teacher.prepare=full", "teacher.allow_weak=true"))
    resume(run.path)
    for record in (run.environment(), RunDir(run.teacher).environment()):
        assert record["threads"] == torch.get_num_threads() and "resumed" not in record


def test_it_says_where_it_goes_on(stopped: RunDir, watch: Watch) -> None:
    progress = watch(lambda done: None)
    resume(stopped.path, progress)
    assert "resuming after step 4 of 6 (1 of 2 epochs are done)" in progress.said


BEFORE_TRAINING = ("evaluating the teacher", "evaluating the network before training")


def test_accuracies_before_training_are_computed_once(tiny: Any, stopped: RunDir, watch: Watch) -> None:
    """Expected: the figures of a run that was not stopped. Outputs that were only in memory are computed again."""
    whole, rest = watch(lambda done: None), watch(lambda done: None)
    expected = start(stopped.recipe(), stopped.path.with_name("whole"), whole).summary
    resume(stopped.path, rest)
    found = stopped.summary()
    assert all(whole.waited.count(title) == 1 and title not in rest.waited for title in BEFORE_TRAINING)
    assert found["student"]["initial_accuracy"] == expected["student"]["initial_accuracy"]
    assert found["teacher"]["accuracy"] == expected["teacher"]["accuracy"]
    assert sum("held in memory and computed again" in text for text in rest.said) == 1
    assert not any("computed again" in text for text in whole.said)


def test_a_figure_is_computed_again_only_for_other_weights_or_images(tmp_path: Path) -> None:
    """Of a student without a classifier it is a table, without labels None."""
    probed = {"val": {"images": 3, "knn": 2 / 3, "linear_probe": 1.0}}
    made = [judged_once(tmp_path, "it", of, lambda value=value: value) for of, value in (("a", probed), ("b", None))]
    assert made == [probed, None] == [judged_once(tmp_path, "it", of, lambda: 0.5) for of in "ab"]
    assert judged_once(tmp_path, "it", "c", lambda: 0.5) == 0.5


@pytest.mark.parametrize("folder", ["run", "run/teacher"])
def test_a_damaged_record_of_accuracies_is_refused(stopped: RunDir, tmp_path: Path, folder: str, watch: Watch) -> None:
    record = tmp_path / folder / "judged.json"
    text = record.read_text()
    for other in (text.replace("the ", "The ", 1), text[:-9], "[]", sealed_text({"the teacher 0": {"val": "high"}})):
        record.write_text(other)
        with pytest.raises(RunError, match=f"{record}.*\n.*do: +remove it"):
            resume(stopped.path)
    record.unlink()
    progress = watch(lambda done: None)
    resume(stopped.path, progress)
    assert [title in progress.waited for title in BEFORE_TRAINING] == [folder != "run", folder == "run"]
    assert record.read_text() == text


def _recorded(run: RunDir) -> tuple[str, str]:
    found = json.loads((run.path / "status.json").read_text())
    return found["status"], found["message"]


@pytest.mark.parametrize("by", ["recipe", "link"])
def test_images_that_were_moved_are_found_at_their_new_place(
    stopped: RunDir, tmp_path: Path, by: str, watch: Watch
) -> None:
    """As the message says, or by a link. Other images at a new place are still refused."""
    moved, before = (tmp_path / "data").rename(tmp_path / "moved"), _recorded(stopped)
    with pytest.raises(Exception, match="If they have moved, write the new path there") as caught:
        resume(stopped.path)
    assert "allowed:" not in str(caught.value)
    assert before == _recorded(stopped) and before[0] == "stopped"  # nothing was done

    def go_to(place: Path) -> None:
        if by == "recipe":
            recipe = load(stopped.path / "recipe.yaml")
            data = recipe.data.model_copy(update={"source": str(place)})
            (stopped.path / "recipe.yaml").write_text(dump(recipe.model_copy(update={"data": data})))
        else:
            (tmp_path / "data").unlink(missing_ok=True)
            (tmp_path / "data").symlink_to(place)

    other = shutil.copytree(moved, tmp_path / "other")
    (other / "train" / "red" / "00.png").write_bytes((other / "train" / "red" / "01.png").read_bytes())
    go_to(other)
    with pytest.raises(RunError, match="the images are not those that the run"):
        resume(stopped.path)
    go_to(moved)
    steps = watch(lambda done: None)
    resume(stopped.path, steps)
    assert steps.steps == 6 - 4 and stopped.is_done


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "dangling link"])
def test_what_is_no_folder_is_not_called_a_run(tiny: Any, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "there")
    with pytest.raises(RunError, match="given:   it is not a folder\n"):
        RunDir.create(tmp_path / "there", tiny.recipe())


def test_the_readme_lists_what_a_run_leaves(tiny: Any, tmp_path: Path) -> None:
    """Every name in a finished run's directory stands in the README's picture of one."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    picture = text.partition("## What a run leaves")[2].partition("```text")[2].partition("```")[0]
    left = {path.name for path in start(tiny.recipe(), tmp_path / "run").run_dir.iterdir()}
    assert "summary.json" in left and [name for name in sorted(left) if name not in picture] == []


def test_a_run_whose_checkpoints_are_gone_is_not_to_be_resumed(stopped: RunDir) -> None:
    """Neither where its student is wanted, nor where another run is to have its place."""
    with pytest.raises(RunError, match="resume with: remap distill --resume"):
        load_task(stopped.path)
    shutil.rmtree(stopped.checkpoint)
    with pytest.raises(RunError, match="holds no tuned student") as caught:
        load_task(stopped.path)
    assert "--resume" not in str(caught.value) and "start the run again in another --output" in str(caught.value)


def test_a_finished_run_is_not_to_be_resumed(tiny: Any, tmp_path: Path) -> None:
    start(tiny.recipe("train.epochs=1"), tmp_path / "run")
    with pytest.raises(RunError, match="exists already") as caught:
        start(tiny.recipe("train.epochs=1"), tmp_path / "run")
    assert "a finished run" in str(caught.value) and "--resume" not in str(caught.value)


@pytest.mark.parametrize("prepare", ["probe", "auto"])
def test_a_class_without_an_evaluation_image_is_named(tiny: Any, tmp_path: Path, watch: Watch, prepare: str) -> None:
    """Once, and not by a trial, of which nothing is heard but its figure."""
    shutil.copytree(tiny.data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "green")
    said = watch(lambda done: None)
    settings = ("train.epochs=1", f"teacher.prepare={prepare}", "teacher.allow_weak=true")
    start(tiny.recipe(*settings, losses="ce,kd", data=str(tmp_path / "data")), tmp_path / "run", said)
    text = "note: 1 of 3 classes have no evaluation image, so accuracy says nothing of green"
    assert len([line for line in said.said if line.endswith(text)]) == 1
