"""A few rounds of tools/fuzz_folders.py; the page of guarantees has the figures of thousands."""

import random
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "fuzz_folders.py"))


@pytest.mark.guarantee(26)
def test_changed_recipes_and_task_folders_are_refused_or_right(tmp_path: Path, figure: Callable[..., None]) -> None:
    recipes, tasks = TOOL["fuzz_recipes"](150, 1), TOOL["fuzz_tasks"](150, 1, tmp_path / "task")
    assert recipes.keys() == {"refused", "loads"} and tasks.keys() == {"refused"}
    figure("changed recipes and task folders, tracebacks", 0, recipes.total() + tasks.total())


def test_the_fuzzer_sees_what_it_looks_for() -> None:
    def fail() -> None:
        raise KeyError("x")

    assert "KeyError" in TOOL["outcome"](fail) and TOOL["outcome"](lambda: None) == "loads"
    draw = random.Random(0)
    assert sum(TOOL["changed_bytes"](b"abcdefgh" * 20, draw) != b"abcdefgh" * 20 for _ in range(100)) > 95
