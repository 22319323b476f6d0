"""``remap repeat`` on the command line: its table, its sentence, its exit codes."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from remap_cli.repeat import _take_threads_of, sentence

NOTHING: dict[str, list[str]] = {"first": [], "repeat": []}
REASONS = {"changed_on_the_way": NOTHING, "outputs_on_disk": NOTHING}


@pytest.fixture
def run(remap: Callable[..., Result], tiny: list[str], pictures: Path) -> str:
    assert remap("tune", "--method", "linear", "--data", pictures, *tiny, "--output", "runs/first").exit_code == 0
    return "runs/first"


def test_equal_is_0_different_is_4_and_a_mistake_is_2(
    remap: Callable[..., Result], run_json: Callable[..., dict], run: str, tmp_path: Path
) -> None:
    found = remap("repeat", run)
    assert found.exit_code == 0, found.output
    assert "It repeated bit for bit; the environment is the same." in found.stdout
    assert "differs" not in found.stdout and "runs/first-repeat-001" in found.stdout
    assert run_json("repeat", run, "--workers", "2")["equal"]

    metrics = tmp_path / run / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[0]["loss"] += 1.0
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = remap("repeat", run, "--output", "runs/first-repeat-001")
    assert found.exit_code == 4 and "It did not repeat bit for bit: history differs;" in found.stdout
    told = remap("repeat", run, "--output", "runs/first-repeat-001", "--json")
    assert told.exit_code == 4 and not json.loads(told.stdout)["equal"]

    found = remap("repeat", "absent")
    assert found.exit_code == 2 and "there is no run directory absent" in found.message


def test_the_sentence_says_what_a_run_met_on_the_way() -> None:
    """After memory ran out, "the environment is the same" alone would leave the reader without a reason."""
    names = ("history", "accumulation", "skipped steps", "accuracy")
    checks = [{"what": name, "equal": name == "accuracy"} for name in names]
    found = {"equal": False, "checks": checks, "tensors": [], "environment": [], **REASONS}
    told = sentence(found)
    assert "history, accumulation, skipped steps differ;" in told
    assert "memory ran out" in told and "not finite" in told and told.endswith("; the environment is the same.")


def test_the_sentence_says_by_how_much_and_where() -> None:
    checks = [{"what": "task file", "equal": False}, {"what": "history", "equal": True}]
    tensors = [{"name": "a", "largest_difference": 1e-3}, {"name": "b", "largest_difference": None}]
    found = {"equal": False, "checks": checks, "tensors": tensors, "environment": [{"what": "threads"}], **REASONS}
    told = "It did not repeat bit for bit: task file differs (weights by at most 0.001); the environment differs."
    assert sentence(found) == told
    changed = {"first": ["a different number of processes (2, then 1)"], "repeat": []}
    words = (
        "; the first run was resumed with a different number of processes (2, then 1), which decides last bits; the env"
    )
    assert words in sentence(found | {"changed_on_the_way": changed})
    read = {"first": [], "repeat": ["vit_x"]}
    words = "; the repeat read outputs of vit_x on disk, with the last bits of the machine that computed them; the env"
    assert words in sentence(found | {"outputs_on_disk": read})


def test_thread_variables_are_those_of_the_run_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before a library is loaded; a record from a stranger sets numbers of threads at most."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("MKL_NUM_THREADS", "8")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    for variables in ([], "x", {"LD_PRELOAD": "x", "OMP_NUM_THREADS": "3; x", "OPENBLAS_NUM_THREADS": "2"}):
        (tmp_path / "environment.json").write_text(json.dumps({"variables": variables}))
        _take_threads_of(tmp_path)
    found = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
    assert found == ["8", None, "2"] and os.environ.get("LD_PRELOAD") != "x"
    _take_threads_of(tmp_path / "absent")
    (tmp_path / "environment.json").write_text("{")
    _take_threads_of(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "8"
