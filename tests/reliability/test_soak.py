"""A short soak; the long one is `python tools/soak.py`, whose figures are on the page of guarantees."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "soak.py"))
RUNS = 6


@pytest.mark.guarantee(21)
def test_runs_that_are_stopped_at_random_leave_nothing_and_lose_nothing(
    tmp_path: Path, figure: Callable[..., None]
) -> None:
    """Expected: the files and the students of undisturbed runs of the same recipes."""
    found = TOOL["soak"](RUNS, 1, tmp_path, ("views on disk", "an average", "ranks that fall"))
    assert found["problems"] == []
    runs = found["runs"]
    assert found["results equal to the uninterrupted run's"] == found["evaluations that repeat the run's"] == runs
    assert sum(found["stopped by"].values()) >= RUNS / 2, "too little was disturbed to say anything"
    figure("short interrupted runs, equal to the uninterrupted ones", runs, runs)


def test_the_soak_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A stray file, another student, other counts and growing memory are problems."""
    recipe = "ranks that fall"
    work = TOOL["Soak"](tmp_path, None, None, (recipe,))
    for run in (work.reference(recipe), tmp_path / "run"):
        (run / "task").mkdir(parents=True)
        (run / "task" / "task.safetensors").write_bytes(b"student")
        (run / "summary.json").write_text('{"student": {"correct": 3}, "data": {"val_images": 9}}')
    assert _problems(work, tmp_path / "run", (3, 9)) == []
    (tmp_path / "run" / ".000012.json.7.tmp").touch()
    (tmp_path / "run" / "task" / "task.safetensors").write_bytes(b"stranger")
    found = _problems(work, tmp_path / "run", (2, 9))
    assert len(found) == 3 and all(word in " ".join(found) for word in ("differs", "tmp", "evaluated again"))
    work.memory = [100 + 2 * sample for sample in range(60)]
    assert work.growth() == 2 * 29, "the slope over the second half of the samples"


def _problems(work: Any, run: Path, counted: tuple[int, int]) -> list[str]:
    work.problems.clear()
    work.evaluate = lambda run: counted
    work.compare(0, work.recipes[0], run)
    return list(work.problems)
