"""A comparison that is stopped: how it goes on, and that every run of it learns from the teacher they share."""

import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.errors import Interrupted, RecipeError, RunError
from remap.pipeline.compare import compare, resumable
from remap.pipeline.comparison_folder import shared_teacher
from remap.pipeline.run import resume, start
from remap.progress import Silent
from remap.recipe import Recipe
from remap.runs.environment import command
from remap.runs.run_dir import RunDir
from remap_cli.report import write

pytestmark = pytest.mark.slow

# Two epochs of three steps: the tuning of the teacher, both runs with it, both runs without it.
RUN = 6
# The teacher is tuned with the seed of the first run that needs it, so that another run alone would make another one.
SETTINGS = ("teacher.prepare=full", "teacher.epochs=2", "teacher.allow_weak=true", "train.checkpoint_seconds=0")
FIRST, SECOND = "bitfit-teacher-s0", "bitfit-teacher-s1"


@pytest.fixture(scope="module")
def recipe(tiny: Any) -> Recipe:
    return tiny.recipe(*SETTINGS, method="bitfit", losses="ce,kd")


@pytest.fixture(scope="module")
def twin(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed comparison."""
    folder = tmp_path_factory.mktemp("compare") / "twin"
    compare(recipe, ["bitfit"], 2, folder, Silent())
    return folder


def _tasks(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/task/task.safetensors")}


@pytest.mark.parametrize(("step", "name"), [(2, FIRST), (2 * RUN + 2, SECOND)], ids=["teacher", "student"])
@pytest.mark.parametrize("by_resume", [True, False])
def test_a_stopped_comparison_goes_on(
    recipe: Recipe, twin: Path, tmp_path: Path, watch: Callable[..., Any], step: int, name: str, by_resume: bool
) -> None:
    """In the tuning of the teacher, and in a run with it; by the command that is named, and by --resume of the run."""

    def stop(done: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted) as caught:
        compare(recipe, ["bitfit"], 2, folder, watch(stop))
    line = shlex.join(command())  # of a program that calls remap, so the message does not say it
    assert f"remap compare ... --output {folder}" in (caught.value.do or "") and caught.value.exit_code == 143
    assert "--resume" not in str(caught.value) and (folder / "command.txt").read_text() == f"{line}\n"
    with pytest.raises(RunError, match="the comparison in .* has not finished") as unfinished:
        write(folder)
    assert line in str(unfinished.value)
    if by_resume:
        resume(folder / name)
        assert not (folder / name / "teacher").exists()
    compare(recipe, ["bitfit"], 2, folder, Silent())
    assert len(_tasks(twin)) == 5 and _tasks(folder) == _tasks(twin)


def test_what_is_no_part_of_a_comparison_has_its_own_teacher(twin: Path, tiny: Any, tmp_path: Path) -> None:
    other = RunDir.create(tmp_path / FIRST, tiny.recipe("train.epochs=1"))
    assert shared_teacher(other) is None
    run = start(tiny.recipe("train.epochs=1", "train.warmup_epochs=0", losses="ce"), twin / "mine").run_dir
    assert shared_teacher(RunDir(run)) is None
    assert shared_teacher(RunDir(twin / FIRST)) == twin / "teacher"


def test_methods_that_do_not_fit_are_left_out_before_anything_is_trained(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    progress, why = watch(lambda step: None), "conv_adapter does not fit plain vision transformers (vit)"
    table = compare(tiny.recipe("train.epochs=1"), ["conv_adapter", "linear"], 1, tmp_path / "c", progress)
    assert [row["method"] for row in table["rows"]] == ["linear"]
    assert table["left_out"]["conv_adapter"].startswith(why)
    assert progress.said[0].startswith(f"conv_adapter is left out: {why}")
    assert f"Left out: {why}" in (tmp_path / "c" / "compare.md").read_text()
    with pytest.raises(RecipeError, match="conv_adapter does not fit"):
        compare(tiny.recipe("train.epochs=1"), ["conv_adapter"], 1, tmp_path / "d", Silent())
    assert not (tmp_path / "d").exists()


def test_finished_runs_that_the_table_does_not_hold_are_named(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    for methods, others in ((["linear", "bitfit"], 0), (["linear"], 2), (["linear", "bitfit"], 0)):
        progress = watch(lambda step: None)
        table = compare(tiny.recipe("train.epochs=1"), methods, 1, tmp_path / "c", progress)
        assert len(table["rows"]) == len(methods)
        said = [line for line in progress.said if "also holds 2 finished runs of an earlier command (bitfit-" in line]
        assert len(said) == bool(others)


def test_no_cell_is_trained_on_images_that_have_changed_meanwhile(
    tiny: Any, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    """At the same path. The finished comparison is still shown; once the images are restored, methods are added."""
    shutil.copytree(tiny.data, tmp_path / "data")
    changed, folder = tmp_path / "data/val/red/00.png", tmp_path / "compare"

    def compared(methods: list[str]) -> int:
        progress = watch(lambda step: None)
        compare(tiny.recipe("train.epochs=1", data=str(tmp_path / "data")), methods, 1, folder, progress)
        return progress.steps

    assert compared(["linear"]) == 2 * 3
    image, other = changed.read_bytes(), (tmp_path / "data/val/red/01.png").read_bytes()
    changed.write_bytes(other)
    assert compared(["linear"]) == 0
    with pytest.raises(RunError, match=r"the images have changed since .*linear-.*-s0 was trained on them"):
        compared(["linear", "bitfit"])
    assert not list(folder.glob("bitfit*"))
    changed.write_bytes(image)
    assert compared(["linear", "bitfit"]) == 2 * 3


def test_images_that_were_moved_are_the_same_images(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """Finished cells stay as they are; one that had begun asks for the new place in its recipe. A folder with one
    other image is refused.
    """
    shutil.copytree(tiny.data, tmp_path / "data")
    folder, done, begun = tmp_path / "compare", "linear-alone-s0", "linear-teacher-s0"

    def compared(name: str) -> int:
        progress = watch(lambda step: None)
        recipe = tiny.recipe("train.epochs=1", data=str(tmp_path / name), losses="ce,feature")
        compare(recipe, ["linear"], 1, folder, progress)
        return progress.steps

    assert compared("data") == 2 * 3
    (tmp_path / "data").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    (tmp_path / "other" / "val" / "red" / "00.png").write_bytes((tmp_path / "other/val/red/01.png").read_bytes())
    before = _tasks(folder)
    assert compared("data") == 0, "the finished comparison is shown without its images"
    assert compared("moved") == 0
    with pytest.raises(RunError, match=f"{done} was made with other images; nothing in it was touched"):
        compared("other")
    (folder / begun / "summary.json").unlink()
    with pytest.raises(RunError, match=f"{begun} was begun with images at another path") as caught:
        compared("moved")
    recipe = folder / begun / "recipe.yaml"
    assert f"write the new place into {recipe}" in (caught.value.do or "")
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "data"), str(tmp_path / "moved")))
    assert compared("moved") == 0 and _tasks(folder) == before, "from its last checkpoint"
    assert (folder / begun / "summary.json").is_file()


@pytest.mark.parametrize("ours", [["remap", "compare", "--data", "a b"], ["python", "-m", "remap_cli", "compare"]])
def test_a_command_that_is_stopped_is_said_as_it_was_typed(
    ours: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remap.pipeline.compare.command", lambda: ours)
    with pytest.raises(Interrupted) as caught, resumable(tmp_path):
        raise Interrupted("stopped", exit_code=143)
    assert f"it was started with: {shlex.join(ours)}; finished runs" in (caught.value.do or "")
