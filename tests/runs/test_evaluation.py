"""A run evaluated again: what it says when the images are not those of the run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.running import start
from remap.runs.evaluation import evaluate_run

Watch = Callable[..., Any]


@pytest.mark.parametrize("memory", [0, 4])
def test_other_evaluation_images_are_said(tiny: Any, tmp_path: Path, watch: Watch, memory: int) -> None:
    """The 9 images of the fixture: one less, then another one in its place. A training image changes nothing."""
    shutil.copytree(tiny.data, tmp_path / "data")
    image, training = (tmp_path / "data" / split / "red" / "00.png" for split in ("val", "train"))
    settings = (f"data.memory_gib={memory}", "teacher.cache=off", "train.epochs=1", "train.warmup_epochs=0")
    run = start(tiny.recipe(*settings, data=str(tmp_path / "data")), tmp_path / "run").run_dir

    def said(data: str | None = None) -> list[str]:
        progress = watch(lambda done: None)
        evaluate_run(run, data, False, progress)
        return [line for line in progress.said if "not those of the run" in line]

    training.unlink()
    assert said() == []
    content = image.read_bytes()
    image.unlink()
    (line,) = said()
    assert "(8 now, 9 then)" in line and said(str(tmp_path / "data" / "val")) == [], "others were asked for"
    image.write_bytes((image.with_name("01.png")).read_bytes())
    (line,) = said()
    assert "(9 now, 9 then)" in line
    image.write_bytes(content)
    assert said() == []
    (run / "summary.json").unlink()
    assert said() == []
