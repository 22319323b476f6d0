"""``remap repeat`` on the command line: its table, its sentence, its exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from remap_cli.repeat import sentence


@pytest.fixture
def run(remap: Callable[..., Result], tiny: list[str], pictures: Path) -> str:
    assert remap("tune", "--method", "linear", "--data", pictures, *tiny, "--output", "runs/first").exit_code == 0
    return "runs/first"


def test_equal_is_0_different_is_1_and_a_mistake_is_2(
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
    assert found.exit_code == 1 and "It did not repeat bit for bit: history differs;" in found.stdout
    told = remap("repeat", run, "--output", "runs/first-repeat-001", "--json")
    assert told.exit_code == 1 and not json.loads(told.stdout)["equal"]

    found = remap("repeat", "absent")
    assert found.exit_code == 2 and "absent is no run directory" in found.message


def test_the_sentence_says_by_how_much_and_where() -> None:
    checks = [{"what": "task file", "equal": False}, {"what": "history", "equal": True}]
    tensors = [{"name": "a", "largest_difference": 1e-3}, {"name": "b", "largest_difference": None}]
    found = {"equal": False, "checks": checks, "tensors": tensors, "environment": [{"what": "threads"}]}
    told = "It did not repeat bit for bit: task file differs (weights by at most 0.001); the environment differs."
    assert sentence(found) == told
