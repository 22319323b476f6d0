"""What cannot be written is named by the path that the user gave, not by a temporary one."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from remap.data.views import View
from remap.errors import DiskFull, RemapError, RunError, naming
from remap.exporting.export import export_student
from remap.network import tuned
from remap.prediction.inputs import Inputs
from remap.prediction.output import PredictionFile
from remap.prediction.predictions import Prediction
from remap.recipe.schema import ModelSpec
from remap.runs.run_dir import RunDir
from remap.runs.task import open_backbone, save_task


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: the system's error for it is that of a limit of file sizes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def task(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tuned(open_backbone(ModelSpec(model=tiny.student), 3), "lora", {})
    network.classes = ("blue", "green", "red")
    folder = tmp_path_factory.mktemp("named") / "task"
    save_task(folder, network, View(network.preprocess.size, 1.0, "bicubic"), "lora", {})
    return folder


@pytest.mark.parametrize("to", ["task", "timm", "torch"])
def test_an_export(task: Path, tmp_path: Path, to: str) -> None:
    with full_disk(3000), pytest.raises(RunError) as caught:
        export_student(task, to, tmp_path / "given")
    assert f"cannot write {tmp_path / 'given'}" in caught.value.what and ".tmp" not in str(caught.value)
    assert "File too large" in caught.value.what and not list(tmp_path.iterdir())


def test_a_run(tiny: Any, tmp_path: Path) -> None:
    with full_disk(100), pytest.raises(DiskFull) as caught:
        RunDir.create(tmp_path / "run", tiny.recipe())
    assert caught.value.what == f"cannot write {tmp_path / 'run' / 'recipe.yaml'}: File too large"


def test_predictions(tiny: Any, tmp_path: Path) -> None:
    path, settings = tmp_path / "rows.jsonl", {"tasks": {"": "x"}, "top": 1}
    with full_disk(10), pytest.raises(DiskFull) as caught:
        PredictionFile(path, settings)
    assert caught.value.what == f"cannot write {path}: File too large"
    file = PredictionFile(path, settings)
    with full_disk(10), pytest.raises(DiskFull) as caught:
        file.predict(Inputs([Path(tiny.data, "val")]), lambda items: ([Prediction(item.path)] for item in items))
    assert caught.value.what == f"cannot write {path}: File too large"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as refused:
        PredictionFile(tmp_path / "file" / "rows.jsonl", settings)
    assert refused.value.what == f"cannot make {tmp_path / 'file' / 'rows.jsonl'}: Not a directory"


def test_every_line_of_a_message_is_renamed() -> None:
    with pytest.raises(RemapError) as caught, naming("/out", "/.out.1.tmp"):
        raise RunError("cannot write /.out.1.tmp/a", given=Path("/.out.1.tmp"), do="choose")
    assert str(caught.value) == "cannot write /out/a\n  given:   /out\n  do:      choose"
