"""Where a run may be made, and how it says it was called."""

import importlib.metadata
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import remap
from remap.errors import RunError
from remap.pipeline import doctor
from remap.pipeline.comparison_folder import claim
from remap.pipeline.run_path import run_path
from remap.recipe import resolve
from remap.runs import environment
from remap.runs.run_dir import RunDir

RECIPE = resolve(words={"method": "linear"})


@pytest.mark.parametrize("left", [[], [".recipe.yaml.12.tmp"], ["recipe.yaml.12.tmp", ".recipe.yaml.12.tmp.12.tmp"]])
def test_an_empty_folder_and_one_of_a_create_that_died_can_be_used(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("half")
    run = RunDir.create(tmp_path, RECIPE)
    assert run.status() == "running" and RunDir.open(tmp_path).recipe().digest() == RECIPE.digest()
    names = {"recipe.yaml", "command.txt", "environment.json", "status.json", *left}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("name", ["recipe.yaml", "thesis.txt", "command.txt", "recipe.yaml.bak"])
def test_any_other_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("keep")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(RunError, match="exists already; nothing in it was touched"):
            RunDir.create(path, RECIPE)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "keep")]


def test_one_of_two_at_the_same_instant_gets_the_folder(tmp_path: Path) -> None:
    """Both have seen it empty."""
    runs = [RunDir(tmp_path), RunDir(tmp_path)]
    runs[0]._claim("first")
    with pytest.raises(RunError, match="exists already"):
        runs[1]._claim("second")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("recipe.yaml", "first")]


def test_commands_of_the_same_instant_take_different_numbers(tmp_path: Path) -> None:
    """The second one chooses its folder while the first one has written nothing yet."""
    (tmp_path / "digits-001").mkdir()
    with run_path(None, tmp_path, "digits") as first, run_path(None, tmp_path, "digits") as second:
        RunDir.create(first, RECIPE)
        assert (first.name, second.name) == ("digits-002", "digits-003")
    assert RunDir.open(first).recipe().digest() == RECIPE.digest()
    assert not second.exists(), "nothing was stored in it"


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with run_path(None, tmp_path / "runs", "digits") as path, pytest.raises(RunError, match="Not a directory"):
        RunDir.create(path, RECIPE)


def test_an_empty_recipe_is_not_that_of_a_default_run(tmp_path: Path) -> None:
    RunDir.create(tmp_path, RECIPE)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RunError, match="recipe.yaml is empty"):
        RunDir.open(tmp_path).recipe()


def test_a_comparison_does_not_claim_a_run(tmp_path: Path) -> None:
    before = sorted(RunDir.create(tmp_path, RECIPE).path.iterdir())
    with pytest.raises(RunError, match="is a run directory"):
        claim(tmp_path, RECIPE)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "begun", ["cell/summary.json", "search/cell/000/summary.json", "round-1/cell/summary.json", "teacher/recipe.yaml"]
)
def test_what_was_begun_is_not_claimed_for_another_recipe(tmp_path: Path, begun: str) -> None:
    claim(tmp_path, RECIPE)
    (tmp_path / begun).parent.mkdir(parents=True)
    (tmp_path / begun).write_text("{}")
    (tmp_path / "teacher" / "task").mkdir(parents=True)
    claim(tmp_path, RECIPE)
    with pytest.raises(RunError, match="another recipe; nothing in it was touched"):
        claim(tmp_path, RECIPE.model_copy(update={"seed": 1}))
    (tmp_path / begun).unlink()
    assert (tmp_path / "teacher" / "task").is_dir()
    claim(tmp_path, RECIPE.model_copy(update={"seed": 1}))
    assert not (tmp_path / "teacher").exists()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunDir.create(Path("~/r"), RECIPE).path == tmp_path / "r" == RunDir.open(Path("~/r")).path
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize(
    ("arguments", "module", "line"),
    [
        (["/usr/bin/remap", "tune", "--data", "my photos"], None, "remap tune --data 'my photos'"),
        (["/x/cli/__main__.py", "tune"], "remap_cli.__main__", "python -m remap_cli tune"),
        (["study.py", "3"], None, "python study.py 3"),
    ],
)
def test_the_command_can_be_typed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], module: str | None, line: str
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    run = RunDir.create(tmp_path / "r", RECIPE)
    assert (run.path / "command.txt").read_text() == line + "\n"


def test_doctor_shows_where_outputs_are_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its folder is not made by looking; one that cannot be made is said with what to do."""
    (tmp_path / "file").write_text("")
    found = {}
    for name in ("new", "file"):
        monkeypatch.setenv("REMAP_CACHE", str(tmp_path / name))
        (found[name],) = (row for row in doctor.examine()["checks"] if row["what"] == "remap's cache")
    assert found["new"]["state"] == "ok" and str(tmp_path / "new") in found["new"]["found"]
    assert (
        found["file"]["state"] == "note"
        and "is not a folder; name another one in REMAP_CACHE" in found["file"]["found"]
    )
    assert not (tmp_path / "new").exists()


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert environment.environment()["remap"] == remap.__version__
    assert doctor.examine()["checks"][1] == {"state": "ok", "what": "remap", "found": remap.__version__}
