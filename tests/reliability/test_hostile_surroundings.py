"""A current folder, or the folder of a comparison, from a stranger; and a launcher that starts a command twice."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from remap.distributed import launch
from remap.errors import Interrupted, RunError
from remap.pipeline.compare import compare
from remap.pipeline.run import start
from remap.pipeline.shrink_student import cut, take_out_skipped
from remap.progress import Silent
from remap.recipe import dump
from remap.recipe.schema import DataSpec, ModelSpec, ShrinkSpec
from remap.runs.task import load_task
from remap_cli.app import app

# Of Python's own library and of others; all are imported by every command, or by those that train.
MODULES = ("typing", "select", "signal", "shlex", "json", "yaml", "rich", "typer", "torch", "timm")


@pytest.mark.parametrize("words", [("losses",), ("tune", "--devices", "2", "--set", "nonsense=1")], ids=["one", "two"])
def test_modules_of_the_current_folder_are_not_run(words: tuple[str, ...], tmp_path: Path) -> None:
    """``python -m`` looks there first. Also in the processes that ``--devices`` starts."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "remap_cli", *words]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in found.stderr and found.returncode == (2 if "--set" in words else 0)


@pytest.mark.parametrize("kind", ["a FIFO", "no UTF-8", "long"])
def test_what_is_no_marker_of_a_comparison_is_not_waited_for(kind: str, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    (folder / "cell").mkdir(parents=True)
    (folder / "cell" / "summary.json").write_text("{}")
    marker = folder / "compare-of.txt"
    os.mkfifo(marker) if kind == "a FIFO" else marker.write_bytes(b"\xff" if kind == "no UTF-8" else b"a" * 2**20)
    before = sorted(folder.rglob("*"))
    with pytest.raises(RunError, match="holds a comparison of another recipe; nothing in it was touched"):
        compare(tiny.recipe(method="bitfit", losses="ce,kd"), ["bitfit"], 1, folder, Silent())
    assert sorted(folder.rglob("*")) == before


def test_advice_can_be_pasted(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose name is a command stays one word of the shell."""

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped", exit_code=143)

    folder = tmp_path / "a; touch made"
    monkeypatch.setattr("remap.pipeline.comparison_workers.run", stopped)
    with pytest.raises(Interrupted) as caught:
        compare(tiny.recipe(method="bitfit", losses="ce,kd"), ["bitfit"], 1, folder, Silent())
    assert f"remap compare ... --output {shlex.quote(str(folder))};" in (caught.value.do or "")


@pytest.mark.parametrize("teacher", [None, "mini_teacher"])
def test_the_advice_on_a_task_that_is_missing_can_be_pasted(tiny: Any, tmp_path: Path, teacher: str | None) -> None:
    """Of a run that was stopped, of one that is done, and of one whose task folder is empty."""
    recipe = tiny.recipe(teacher=teacher, losses="ce,kd" if teacher else "ce")
    advice = f"remap {'distill' if teacher else 'tune'} --resume {shlex.quote(str(tmp_path / 'a; touch made'))}"
    run = tmp_path / "a; touch made"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump(recipe.written_out()))
    for status in ("stopped", "done"):
        (run / "status.json").write_text(f'{{"status": "{status}"}}')
        with pytest.raises(RunError) as caught:
            load_task(run)
        assert advice in (caught.value.do or "")
    for name in ("checkpoint", "task"):
        (run / name).mkdir()
    with pytest.raises(RunError) as caught:
        load_task(run / "task")
    assert advice in (caught.value.do or "")


def test_one_process_of_a_launcher_predicts(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tiny.recipe("train.epochs=1", method="linear", losses="ce"), tmp_path / "run").run_dir
    words = ["predict", str(run), f"{tiny.data}/val", "--json"]
    alone = CliRunner().invoke(app, words)
    assert alone.exit_code == 0 and alone.stdout.count('"path"') == 9  # the images that ``tiny`` has to evaluate on
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank, shown in (("0", alone.stdout), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 0 and found.stdout == shown


@pytest.mark.parametrize("what", [["--depth", "1", "--blocks", "uniform"], ["--gates", "0"]], ids=["shape", "gates"])
def test_several_processes_do_not_cut_one_model(
    what: list[str], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "accelerator", lambda: SimpleNamespace(num_processes=2))
    found = CliRunner().invoke(app, ["shrink", tiny.teacher, *what, "--output", str(tmp_path / "small")])
    assert isinstance(found.exception, RunError) and "a model is cut in one process" in str(found.exception)
    assert not (tmp_path / "small").exists()


def test_libraries_that_cut_in_several_processes_are_told_so(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "accelerator", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RunError, match="a model is cut in one process"):
        cut(ModelSpec(model=tiny.teacher), ShrinkSpec(depth=1), DataSpec(), tmp_path / "small")
    with pytest.raises(RunError, match="a model is cut in one process"):
        take_out_skipped(tmp_path / "run", tmp_path / "small", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launchers set it, so before any image is looked at
    with pytest.raises(RunError, match="one after the other in one process\n  given:   2 processes"):
        compare(tiny.recipe(losses="ce,kd"), ["linear"], 1, tmp_path / "table", Silent())
