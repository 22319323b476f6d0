"""Options that a command would ignore beside others: named, before anything is written."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from remap.data.sources import find_source
from remap.engine.lr_range import LrRange
from remap.errors import DataError
from remap.prediction.inputs import Inputs

SESSIONS = ["compare", "--sessions", "2"]
SUITE = ["compare", "--suite", "offline"]
IGNORED = [
    ([*SESSIONS, "--teacher", "mini_teacher"], ["--teacher: not for --sessions"]),
    ([*SESSIONS, "--set", "teacher.prepare=probe"], ["--set teacher.prepare: not for --sessions"]),
    ([*SESSIONS, "--unlabeled", "photos"], ["--unlabeled: not for --sessions"]),
    ([*SESSIONS, "--losses", "ce,kd"], ["--losses: kd: not for --sessions"]),
    (
        [*SESSIONS, "--loss-set", "kd", "--sweep", "train.lr=1,2"],
        ["2 problems", "--loss-set: not", "--sweep: not"],
    ),
    ([*SUITE, "--sessions", "2", "--ways", "lwf"], ["2 problems", "--sessions: not for --suite", "--ways: not"]),
    ([*SUITE, "--recipe", "digits"], ["--recipe: not for --suite", "--set"]),
    (["compare", "--sets", "photos"], ["--sets", "--suite"]),
    (["compare", "--ways", "lwf"], ["--ways", "--sessions"]),
    (["compare", "--epochs", "1", "--budget", "epochs=2"], ["--epochs: the epochs follow from the budget epochs=2"]),
    (["compare", "--set", "train.epochs=1", "--budget", "minutes=2"], ["--set train.epochs", "minutes=2"]),
    (["lr", "--set", "train.lr=0.1"], ["--set train.lr: the test tries rates of its own"]),
    (
        ["shrink", "run", "--output", "new", "--gates", "0.1", "--data", "digits", "--seed", "0", "--weights", "none"],
        ["3 problems", "--data: --gates removes blocks of a run", "--seed:", "--weights:"],
    ),
    (
        ["shrink", "vit_large", "--output", "new", "--depth", "6", "--importance", "taylor"],
        ["--importance: chooses nothing, since only blocks are removed"],
    ),
    (
        ["shrink", "vit_large", "--output", "new", "--mlp", "64", "--blocks", "uniform"],
        ["--blocks: chooses nothing, since no block is removed"],
    ),
    (
        [
            "shrink",
            "vit_large",
            "--output",
            "new",
            "--depth",
            "6",
            "--blocks",
            "uniform",
            "--images",
            "8",
            "--seed",
            "1",
            "--data",
            "nowhere",
        ],
        ["3 problems", "--images: chooses nothing, since nothing is measured on images", "--seed:", "--data:"],
    ),
    (
        ["extend", "run", "--data", "digits", "--explain", "--how", "bogus", "--output", "new"],
        ["--explain trains nothing (leave --how, --output out)"],
    ),
    (["models", "vit", "--support", "mini_student"], ["--support: is about one model alone"]),
    (["recommend", "--epochs", "1", "--budget", "epochs=2"], ["--epochs: the epochs follow"]),
]


@pytest.mark.parametrize(("words", "parts"), IGNORED)
def test_what_would_be_ignored_is_refused(
    remap: Callable[..., Result], words: list[str], parts: list[str], tmp_path: Path
) -> None:
    result = remap(*words)
    assert result.exit_code == 2
    assert [part for part in parts if part not in result.message] == []
    assert list(tmp_path.iterdir()) == []


def test_the_budget_of_a_suite_decides_the_epochs(remap: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("budget: epochs=3\nsets:\n  digits: {data: {source: digits}}\n")
    result = remap("compare", "--suite", "own.yaml", "--epochs", "1")
    assert result.exit_code == 2 and "--budget epochs=N" in result.message


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--methods", ","],
        [*SUITE, "--methods", " "],
        [*SESSIONS, "--methods", " "],
        [*SESSIONS, "--ways", " "],
        ["compare", "--jobs", " "],
        ["recommend", "--methods", ","],
    ],
)
def test_a_list_of_nothing_is_not_the_default(remap: Callable[..., Result], words: list[str], tmp_path: Path) -> None:
    """The default would run for hours."""
    result = remap(*words)
    assert result.exit_code == 2 and words[-2] in result.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        *[(command, "--methods", names) for command in ("compare", "recommend") for names in (",linear", "linear,")],
        ("compare", "--loss-set", "ce,,kd"),
    ],
)
def test_a_name_that_is_missing_in_a_list_is_said(
    remap: Callable[..., Result], command: str, option: str, names: str, tmp_path: Path
) -> None:
    result = remap(command, option, names)
    assert result.exit_code == 2 and list(tmp_path.iterdir()) == []
    assert [part for part in (option, names, "a name is missing") if part not in result.message] == []


@pytest.mark.parametrize(
    "words",
    [["predict", "run", ""], ["tune", "--output", ""], ["tune", "--output="], ["eval", ""], ["compare", "--data", ""]],
)
def test_an_empty_word_is_refused(remap: Callable[..., Result], words: list[str], tmp_path: Path) -> None:
    """As of a variable that is not set: as a path it would be the current folder."""
    result = remap(*words)
    assert result.exit_code == 2 and "a word of the command line is empty" in result.message
    assert f"remap {shlex.join(words)}" in result.message and list(tmp_path.iterdir()) == []


def test_a_setting_may_be_empty(remap: Callable[..., Result]) -> None:
    """Its own message says what is wanted."""
    assert "got nothing" in remap("tune", "--set=train.epochs=").message


def test_in_python_an_empty_word_is_not_the_current_folder() -> None:
    for words in (([""],), (["photos", ""],)):
        with pytest.raises(DataError, match="no images are named"):
            Inputs(*words)
    with pytest.raises(DataError, match="no such data"):
        find_source("")


def test_words_of_slurm_are_read_before_the_folder_is_made(remap: Callable[..., Result], tmp_path: Path) -> None:
    result = remap("compare", "--methods", "linear", "--slurm", "gpu", "--output", "c")
    assert result.exit_code == 2 and "'gpu' has no value" in result.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".", "..", "out", "out.txt"])
def test_predictions_need_the_name_of_a_file(remap: Callable[..., Result], name: str, tmp_path: Path) -> None:
    """Before the run is opened: here is none."""
    (tmp_path / "x.png").touch()
    result = remap("predict", "run", "x.png", "--output", name)
    assert result.exit_code == 2 and "predictions are not written in such a file" in result.message


def test_a_short_range_test_shows_every_step(remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [10.0**power for power in range(-9, 1)]
    found = LrRange(rates, list(map(float, range(10))), lowest=1e-2, suggested=1e-3, diverged=False)
    monkeypatch.setattr("remap.pipeline.find_lr.find_lr", lambda *_, **__: found)
    shown = remap("lr", "--steps", "10").stdout
    assert [rate for rate in rates if f"{rate:.2e}" not in shown] == []
