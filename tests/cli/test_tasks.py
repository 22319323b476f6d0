"""``remap tasks`` and the options of ``remap predict`` that write a file, on a short run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result


@pytest.fixture
def run(remap: Callable[..., Result], pictures: Path) -> str:
    words = ["--student", "mini_student", "--epochs", "1", "--method", "linear", "--batch-size", "8", "--output", "run"]
    assert remap("tune", "--data", pictures, *words).exit_code == 0
    return "run"


def test_a_shelf_from_add_to_predict(run: str, remap: Callable[..., Result], pictures: Path, tmp_path: Path) -> None:
    added = remap("tasks", "add", "shelf", f"one={run}", f"two={run}")
    assert added.exit_code == 0, getattr(added, "message", added.output)
    assert remap("tasks", "switch", "shelf", "two").exit_code == 0
    listed = json.loads(remap("tasks", "ls", "shelf", "--json").stdout)
    assert [(row["name"], row["current"]) for row in listed] == [("one", False), ("two", True)]
    assert remap("tasks", "verify", "shelf").exit_code == 0
    assert remap("tasks", "add", "shelf", f"three={run}").exit_code == 0
    asked = remap("tasks", "remove", "shelf", "three")
    assert asked.exit_code == 2 and "confirm with --yes" in asked.message
    removed = remap("tasks", "remove", "shelf", "three", "--yes")
    assert removed.exit_code == 0 and "three" not in removed.stdout
    assert "no task 'three'" in remap("tasks", "remove", "shelf", "three", "--yes").message
    misplaced = remap("tasks", "add", run, f"one={run}")
    assert misplaced.exit_code == 2 and "is not a shelf, and not empty" in misplaced.message
    assert not Path(run, "shelf.json").exists()
    unknown = remap("tasks", "export", "shelf", "--task", "three", "--output", "one_file")
    assert unknown.exit_code == 2 and "there is no task 'three'" in unknown.message
    by_run = remap("predict", run, pictures / "val", "--json")
    by_shelf = remap("predict", "shelf", pictures / "val", "--json")
    assert by_run.exit_code == 0 and by_run.stdout == by_shelf.stdout

    out = remap("predict", "--task", f"a={run}", "--task", "b=shelf/tasks/one", pictures / "val", "--output", "o.jsonl")
    assert out.exit_code == 0, getattr(out, "message", out.output)
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["a", "b"] * 12
    beside = remap("predict", run, "--task", f"a={run}", pictures / "val")
    assert beside.exit_code == 2 and "run: a run beside --task" in beside.message
    again = remap("predict", run, pictures / "val", "--output", "o.jsonl")
    assert again.exit_code == 2 and "is there already" in again.message
    (pictures / "bad.png").write_bytes(b"text")
    summary = remap("predict", run, pictures / "bad.png", "--output", "bad.csv", "--json")
    assert remap("predict", run, pictures / "bad.png", "--output", "skipped.csv", "--skip-bad").exit_code == 0
    (pictures / "bad.png").unlink()
    assert summary.exit_code == 2 and "not an image" in Path("skipped.csv").read_text()
    assert json.loads(summary.stdout) == {"output": "bad.csv", "images": 1, "unreadable": 1}

    Path("shelf/tasks/one/task.safetensors").write_bytes(b"")
    damaged = remap("tasks", "verify", "shelf", "--json")
    assert damaged.exit_code == 2 and [bool(row["problem"]) for row in json.loads(damaged.stdout)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["predict"],
        ["predict", "--task", "run", "x.png"],
        ["predict", "run", "x.png", "--embeddings"],
        ["tasks", "add", "shelf", "run"],
        ["tasks", "add", "shelf", "a=one", "a=two"],
    ],
)
def test_commands_that_lack_something_say_what(remap: Callable[..., Result], words: list[str]) -> None:
    found = remap(*words)
    assert found.exit_code == 2 and "1 problem" in found.message
    assert words[0] == "predict" or "got 'run'" in found.message or "a name is given twice" in found.message
