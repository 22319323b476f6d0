"""``remap extend`` and ``remap compare --sessions`` from their options to what they print."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import Result

from remap_cli.extend import _some


@pytest.fixture
def three(pictures: Path, tmp_path: Path) -> Path:
    """The pictures, and red ones with their channels turned as a third class, green."""
    shutil.copytree(pictures, tmp_path / "three")
    for path in sorted((tmp_path / "three").glob("*/red/*.png")):
        target = path.parent.with_name("green") / path.name
        target.parent.mkdir(exist_ok=True)
        red, green, blue = Image.open(path).split()
        Image.merge("RGB", (blue, red, green)).save(target)
    return tmp_path / "three"


def test_sessions_from_the_first_to_a_report(remap: Callable[..., Result], three: Path) -> None:
    words = ["--student", "mini_student", "--epochs", "1", "--method", "linear", "--batch-size", "8"]
    first = remap("tune", "--data", three, *words, "--set", "data.only=blue,green", "--output", "first")
    assert first.exit_code == 0, getattr(first, "message", first.output)
    new = ["extend", "first", "--data", three, "--only", "red"]
    explained = remap(*new, "--explain", "--json")
    assert explained.exit_code == 0, getattr(explained, "message", explained.output)
    ways = json.loads(explained.stdout)["ways"]
    assert [way["way"] for way in ways if way["fits"]] == ["ranpac", "prototypes", "lwf"] and not Path("runs").exists()
    done = remap(*new, "--how", "prototypes", "--output", "second", "--json")
    assert done.exit_code == 0, getattr(done, "message", done.output)
    assert [len(row) for row in json.loads(done.stdout)["sessions"]["accuracy"]] == [1, 2]
    page = Path("second/report.html").read_text()
    assert (
        "<h2>Sessions</h2>" in page
        and "blue, green" in page
        and "Sessions" not in Path("first/report.html").read_text()
    )
    evaluated = remap("eval", "second")
    assert "images of the last session" in evaluated.stderr and "last session" not in remap("eval", "first").stderr
    verified = remap("tasks", "verify", "second", "--json")
    assert [row["same_features"] for row in json.loads(verified.stdout)] == [True, True]
    assert remap(*new, "--how", "ranpac", "--output", "projected").exit_code == 0
    projected = json.loads(remap("tasks", "verify", "projected", "--json").stdout)
    assert [row["same_features"] for row in projected] == [True, True]  # a random projection of them is read
    assert remap("tasks", "verify", "first").exit_code == 2  # neither a shelf nor extended
    refused = remap(*new, "--how", "prototypes", "--memory", "2", "--output", "third")
    assert refused.exit_code == 2 and "--memory" in refused.message
    remembering = remap(*new, "--how", "lwf", "--memory", "2", "--epochs", "1", "--output", "third")
    assert remembering.exit_code == 0, getattr(remembering, "message", remembering.output)
    rows = json.loads(remap("tasks", "verify", "third", "--json").stdout)
    assert [row["same_features"] for row in rows] == [True, True]  # of `linear`, whose features never change
    assert rows[0]["drop"] == rows[0]["then"] - rows[0]["now"] and not rows[0]["problem"]
    Path("first/task/task.safetensors").write_bytes(b"damaged")
    assert remap("tasks", "verify", "third").exit_code == 2
    memory = json.loads(Path("third.memory.json").read_text())
    assert sorted(image["label"] for image in memory["parts"][0]["images"]) == ["blue", "blue", "green", "green"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], ""),
        (["ant", "bee"], "ant, bee"),
        ([f"class {n}" for n in range(9)], "class 0, class 1, class 2, class 3 and 5 more"),
        (["x" * 50, "y"], f"{'x' * 50} and 1 more"),
    ],
)
def test_classes_that_a_cell_does_not_hold_are_counted(names: list[str], shown: str) -> None:
    assert _some(names) == shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sessions", "2"], "2 sessions of 2 classes (allowed: from 4 classes on"),
        (["--ways", "lwf"], "--ways"),
        (["--sessions", "2", "--jobs", "2"], "--jobs: not for --sessions"),
    ],
)
def test_mistakes_of_a_comparison_over_sessions(
    remap: Callable[..., Result], pictures: Path, words: list[str], said: str
) -> None:
    refused = remap("compare", "--data", pictures, *words)
    assert refused.exit_code == 2 and said in refused.message
