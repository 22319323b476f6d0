"""A finished run whose results were lost or cut off on the way: said, and written again from its checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.errors import RunError
from remap.pipeline.run import Result, resume, start
from remap.runs.task import load_task


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return start(tiny.recipe(losses="ce", teacher=None), tmp_path_factory.mktemp("lost") / "run")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("task/task.json", Path.unlink, "task.json is missing; the run itself is finished"),
        ("task/task.json", cut, "cannot read"),
        ("task/task.safetensors", cut, "is damaged"),
        ("summary.json", cut, None),
    ],
)
def test_results_are_written_again(
    finished: Result, watch: type[Any], name: str, harm: Callable[[Path], None], says: str | None
) -> None:
    """The bytes are those from before; no step is trained."""
    run = finished.run_dir
    before = (run / "task" / "task.safetensors").read_bytes()
    harm(run / name)
    if says is not None:
        with pytest.raises(RunError, match=says) as caught:
            load_task(run)
        assert f"remap tune --resume {run}" in str(caught.value) and name in str(caught.value)
    progress = watch(lambda step: None)
    again = resume(run, progress)
    assert any(name in line and "written again" in line for line in progress.said) and progress.steps == 0
    assert (run / "task" / "task.safetensors").read_bytes() == before
    assert again.summary["student"]["accuracy"] == finished.summary["student"]["accuracy"]
    load_task(run)
    resume(run, progress)
    assert "is finished already" in progress.said[-1]
