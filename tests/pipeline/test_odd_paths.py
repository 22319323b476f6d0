"""Paths that are none of the usual: names that are no UTF-8, and names with spaces in the advice that is given."""

import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.errors import Interrupted, RunError
from remap.pipeline.compare import compare
from remap.pipeline.repeat import repeat
from remap.pipeline.run import start
from remap.progress import Silent
from remap.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def latin(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The images in a folder whose name is a byte that no UTF-8 has, as of an old system."""
    place = tmp_path_factory.mktemp("latin") / os.fsdecode(b"d\xff")
    return str(shutil.copytree(tiny.data, place))


@pytest.mark.parametrize("keep", ["memory", "disk", "off"])
def test_a_teacher_teaches_from_a_folder_of_any_name(
    tiny: Any, latin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    """Names of folders change no result: the figures are those of the same images in another one."""
    words = (f"teacher.cache={keep}", "train.epochs=1", "train.warmup_epochs=0")
    found = start(tiny.recipe(*words, data=latin), tmp_path / "latin")
    usual = start(tiny.recipe(*words), tmp_path / "usual")
    assert found.summary["final_losses"] == usual.summary["final_losses"]
    assert RunDir(tmp_path / "latin").recipe().data.source == latin


def test_methods_are_compared_in_a_folder_of_any_name(tiny: Any, latin: str, tmp_path: Path) -> None:
    """They share a teacher, which is told from others by the words for it."""
    recipe = tiny.recipe("train.epochs=1", "train.warmup_epochs=0", losses="kd", data=latin)
    table = compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent())
    assert len(table["rows"]) == 1 and table["data"] == latin


def test_a_run_that_could_not_be_read_again_is_not_begun(tiny: Any, tmp_path: Path) -> None:
    """Safetensors opens files by names in UTF-8 only: such a run was trained, and then could not be used."""
    run = tmp_path / os.fsdecode(b"r\xff")
    with pytest.raises(RunError, match="a run directory cannot be made there") as caught:
        start(tiny.recipe(losses="ce", teacher=None), run)
    assert "r\\udcff: it holds a byte that is not UTF-8" in str(caught.value) and not run.exists()


def words_after(text: str, before: str) -> list[str]:
    """What a shell makes of the line of advice after these words."""
    (line,) = [line.partition(before)[2] for line in text.splitlines() if before in line]
    return shlex.split(line)


def test_advice_is_fit_for_a_shell(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    """Every command that is proposed names the run as one word."""
    run = tmp_path / "a run; rm it's"
    recipe = tiny.recipe("train.epochs=2", losses="ce", teacher=None)

    def stop(step: int) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as interrupted:
        start(recipe, run, watch(stop))
    assert words_after(str(interrupted.value), "resume with: ") == ["remap", "tune", "--resume", str(run)]
    with pytest.raises(RunError, match="exists already") as taken:
        RunDir.create(run, recipe)
    with pytest.raises(RunError, match="no result") as unfinished:
        repeat(run)
    for error in (taken, unfinished):
        assert shlex.quote(str(run)) in str(error.value).partition("--resume ")[2]
    with (
        RunDir.open(run).held(),
        pytest.raises(RunError, match="another process") as busy,
        RunDir.open(run).held(),
    ):
        pass
    assert shlex.quote(str(run / "stop")) in str(busy.value).partition("touch ")[2]


def test_advice_of_a_repeat_is_fit_for_a_shell(tiny: Any, tmp_path: Path, watch: Callable[..., Any]) -> None:
    run, again = start(tiny.recipe(losses="ce", teacher=None), tmp_path / "a run").run_dir, tmp_path / "once more"

    def stop(step: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as interrupted:
        repeat(run, again, progress=watch(stop))
    expected = ["remap", "repeat", str(run), "--output", str(again)]
    assert words_after(str(interrupted.value), "resume with: ") == expected
    (run / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="no figures of this version") as lacking:
        repeat(run)
    assert words_after(str(lacking.value), "repeat that: ") == ["remap", "tune", "--recipe", str(run / "recipe.yaml")]
