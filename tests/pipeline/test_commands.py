"""The commands as Python functions: what they return is what the runs say, and the progress is reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import remap
from remap.errors import DataError, RecipeError, RunError
from remap.runs.run_dir import RunDir


def test_tune_then_evaluate(tiny: Any, tmp_path: Path, watch: Any) -> None:
    """Expected: six steps (24 images, batches of 8, two epochs), and the accuracy of the run's own summary."""
    seen = watch(lambda step: None)
    words = {"data": tiny.data, "student": tiny.student, "method": "linear"}
    result = remap.tune(words, settings=tiny.SETTINGS, output=tmp_path / "run", progress=seen)
    assert seen.steps == 6 and seen.said
    found = remap.evaluate(result.run_dir)
    assert found["accuracy"] == RunDir(tmp_path / "run").summary()["student"]["accuracy"]
    assert [row["class"] for row in found["classes"]] == ["blue", "green", "red"]
    rows = list(remap.predict(result.run_dir, f"{tiny.data}/val", device="cpu"))
    assert sum(row.top[0][0] == Path(row.path).parent.name for row in rows) == found["correct"]


def test_tune_takes_no_teacher(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"remap.tune has none; use remap.distill"):
        remap.tune(tiny.words(method="linear"))


def test_what_is_no_recipe_is_refused() -> None:
    """None would train the embedded default in silence."""
    for recipe in (None, ["digits"], 3):
        with pytest.raises(RecipeError, match=f"recipe: should be a name or file.*, got {type(recipe).__name__}"):
            remap.distill(recipe)  # type: ignore[arg-type]


def test_compare_gives_a_row_a_method(tiny: Any, tmp_path: Path) -> None:
    settings = [*tiny.SETTINGS, "train.epochs=1", "teacher.allow_weak=true"]
    table = remap.compare(tiny.words(), ["linear"], seeds=1, settings=settings, output=tmp_path / "table")
    assert [row["method"] for row in table["rows"]] == ["linear"] and table["seeds"] == [0]
    with pytest.raises(RecipeError, match="a comparison has one"):
        remap.compare(tiny.recipe(teacher=None, losses="ce"), ["linear"])
    with pytest.raises(RecipeError, match="seeds: 0 runs of each cell"):
        remap.compare(tiny.recipe(), ["linear"], seeds=0)


def test_one_text_is_not_a_list(tiny: Any) -> None:
    """Python would read it letter by letter."""
    for command in (remap.tune, remap.distill, remap.compare, remap.recommend, remap.find_lr):
        with pytest.raises(RecipeError, match=r"settings: should be a list, got one text \(write \['train.lr=1'\]\)"):
            command(tiny.words(), settings="train.lr=1")
    for name in ("sweeps", "loss_sets"):
        with pytest.raises(RecipeError, match=f"{name}: should be a list"):
            remap.compare(tiny.words(), **{name: "ce,kd"})  # type: ignore[arg-type]


def test_callbacks_are_objects(tiny: Any, tmp_path: Path) -> None:
    for wrong, shown in ((remap.Callback, r"the class Callback \(write Callback\(\)\)"), (print, "print")):
        with pytest.raises(RecipeError, match=f"callbacks: should be objects of a remap.Callback, got .*{shown}"):
            remap.distill(tiny.words(), output=tmp_path / "run", callbacks=[wrong])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_names_of_images_are_read_and_no_pictures(tiny: Any) -> None:
    for wrong in (None, [Image.new("RGB", (4, 4))]):
        with pytest.raises(DataError, match="predict reads images by their names"):
            list(remap.predict("runs/none", wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("command", [remap.compare, remap.recommend])
def test_epochs_beside_a_budget_of_epochs_are_refused(command: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    """They would be ignored. ``--budget parameters`` decides no epochs."""
    both = {"budget": "epochs=3", "output": tmp_path / "c"}
    with pytest.raises(RecipeError, match="epochs: the epochs follow from the budget epochs=3"):
        command(tiny.words(epochs=2), ["linear"], **both)
    with pytest.raises(RecipeError, match="settings train.epochs: the epochs follow from the budget epochs=3"):
        command(tiny.words(), ["linear"], settings=iter(["seed=1", " train.epochs = 2"]), **both)
    assert not (tmp_path / "c").exists()


def test_shrink_cuts_a_folder(tiny: Any, tmp_path: Path) -> None:
    """The depths are those that were asked for, of three blocks."""
    found = remap.shrink(tiny.teacher, tmp_path / "small", depth=2, blocks="uniform", data=tiny.data)
    assert (found.before.depth, found.after.depth, len(found.kept)) == (3, 2, 2)
    assert (tmp_path / "small" / "model.safetensors").is_file()
    with pytest.raises(RecipeError, match="nothing is to be cut"):
        remap.shrink(tiny.teacher, tmp_path / "other")
    with pytest.raises(RecipeError, match="depth"):
        remap.shrink(tiny.teacher, tmp_path / "other", depth=0)
    with pytest.raises(RecipeError, match="images: chooses nothing"):
        remap.shrink(tiny.teacher, tmp_path / "other", depth=2, blocks="uniform", images=8)
    with pytest.raises(RecipeError, match="seed: should be less than 4294967296"):
        remap.shrink(tiny.teacher, tmp_path / "other", depth=2, seed=2**32)
    with pytest.raises(RunError, match="is there already"):  # and not the model, which would be opened first
        remap.shrink("local-dir:absent", tmp_path / "small", depth=2)
