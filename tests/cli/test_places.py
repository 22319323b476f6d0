"""Words that name a place where nothing can be: every command answers with one message and exit code 2."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from remap.cache.cache_folders import cache_root
from remap.errors import RemapError, RunError
from remap.pipeline.student_api import load_student

# A user who is not there, a name longer than any file system takes, and one that no argument of a process can hold.
PLACES = {"nobody": "~nobody-of-this-name/x", "long": "x" * 5000, "NUL": "a\0b"}
SHORT = ["--weights", "none", "--epochs", "1"]
COMMANDS = [
    ["distill", *SHORT, "--teacher", "PLACE"],
    ["distill", *SHORT, "--teacher", "local-dir:PLACE"],
    ["distill", *SHORT, "--unlabeled", "PLACE"],
    ["distill", *SHORT, "--output", "PLACE"],
    ["distill", "--resume", "PLACE"],
    ["tune", *SHORT, "--data", "PLACE"],
    ["tune", *SHORT, "--val-data", "PLACE"],
    ["tune", *SHORT, "--student", "local-dir:PLACE"],
    ["tune", "--weights", "PLACE.safetensors"],
    ["tune", "--recipe", "PLACE"],
    ["tune", "--devices", "2", "--resume", "PLACE"],
    ["compare", *SHORT, "--methods", "linear", "--seeds", "1", "--output", "PLACE"],
    ["cache", "build", "--data", "PLACE"],
    ["eval", "PLACE"],
    ["predict", "PLACE", "IMAGE"],
    ["predict", "RUN", "PLACE"],
    ["repeat", "PLACE"],
    ["shrink", "PLACE", "--output", "new", "--depth", "1"],
    ["shrink", "PLACE", "--output", "new", "--gates", "0.1"],
    ["shrink", "vit_mini_student_patch4_32", "--weights", "none", "--output", "PLACE", "--depth", "1"],
    ["recipes", "show", "PLACE.yaml"],
    ["recipes", "copy", "digits", "PLACE"],
    ["recipes", "validate", "PLACE.yaml"],
]
WITH_A_RUN = [["eval", "RUN", "--data", "PLACE"], ["repeat", "RUN", "--output", "PLACE"]]


def assert_one_message(result: Result) -> None:
    """Ours, or Typer's, which knows no path with a NUL; the fixture lets no other exception pass."""
    text = getattr(result, "message", result.stderr)
    assert result.exit_code == 2 and text and "Traceback" not in text


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_place_that_cannot_be(
    words: list[str], place: str, remap: Callable[..., Result], pictures: Path, tmp_path: Path
) -> None:
    image = str(next(pictures.glob("val/*/*.png")))
    result = remap(*(word.replace("PLACE", place).replace("IMAGE", image) for word in words))
    assert_one_message(result)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_beside_a_run(remap: Callable[..., Result], pictures: Path, tmp_path: Path) -> None:
    done = remap("tune", "--data", pictures, *SHORT, "--batch-size", "8", "--method", "linear", "--output", "run")
    assert done.exit_code == 0
    for words in WITH_A_RUN:
        for place in PLACES.values():
            result = remap(*(word.replace("PLACE", place).replace("RUN", "run") for word in words))
            assert_one_message(result)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_a_place_that_cannot_be_in_python(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RemapError):
        load_student(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("environment", [{"REMAP_CACHE": "~nobody-of-this-name/x"}, {}], ids=["nobody", "no home"])
def test_a_cache_without_a_place(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry in the table of users: Python then leaves the ``~`` as it is."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(RunError, match="the path of the teacher cache is not valid[^$]*REMAP_CACHE"):
        cache_root(environment)
