"""What a launcher says in environment variables is checked before PyTorch and Accelerate read it.

Expected values: the variables of torchrun (https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment
Variables"): ranks count from 0 and lie below the number of processes, and many processes need an address to meet at.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.distributed import launch, launcher_env
from remap.errors import TrainingError
from remap_cli import launch as command_line

pytestmark = pytest.mark.slow

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_RANK")
WRONG = [
    ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR not set", "env -u WORLD_SIZE remap"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR not set", "env -u RANK -u WORLD_SIZE remap"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1"}, "the rank is not below", "RANK=2, WORLD_SIZE=2"),
    ({"RANK": "1"}, "the rank is not below the number of processes", "env -u RANK remap"),
    ({"RANK": "abc"}, "RANK must be a whole number", "'abc'"),
    ({"RANK": "-1"}, "RANK must be a whole number", "from 0"),
    ({"RANK": ""}, "RANK must be a whole number", "env -u RANK remap"),
    ({"RANK": "9" * 5000}, "RANK must be a whole number", "from 0"),
    ({"RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE must be a whole number", "'x'"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number", "from 1"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number", "from 1"),
    ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE must be a whole number", "'x'"),
    ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK must be a whole number", "'1.5'"),
]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets these variables of a launcher and no others."""

    def set_all(found: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, word in found.items():
            monkeypatch.setenv(name, word)

    return set_all


@pytest.mark.parametrize(("found", "what", "more"), WRONG, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_one_message(say: Callable, found: dict[str, str], what: str, more: str) -> None:
    say(found)
    with pytest.raises(TrainingError, match=what) as caught:
        launch.accelerator.__wrapped__()
    assert more in str(caught.value) and caught.value.exit_code == 2


def test_accelerates_own_variables_are_named(say: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate reads variables of its own; here the name of a compiler that it does not know."""
    say({})
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "nonsense")
    with pytest.raises(TrainingError, match="Accelerate cannot start") as caught:
        launch.accelerator.__wrapped__()
    assert "NONSENSE" in str(caught.value) and "ACCELERATE_*" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("word", ["0", "-1", "", "two"])
def test_an_impossible_number_of_processes_is_refused_before_more_are_started(say: Callable, word: str) -> None:
    say({"WORLD_SIZE": word})
    with pytest.raises(TrainingError, match="WORLD_SIZE must be a whole number"):
        command_line.has_launcher()


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"LOCAL_RANK": "-1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        {"PMI_RANK": "1", "WORLD_SIZE": "2"},  # mpirun, which says the rank under a name of its own
    ],
    ids=str,
)
def test_what_launchers_say_passes(say: Callable, found: dict[str, str]) -> None:
    say(found)
    launcher_env.require_complete()
    assert command_line.is_first() is (found.get("RANK", "0") == "0")


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ({"RANK": "abc"}, "RANK must be a whole number"),  # the first place that asks which process this is
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "Accelerate cannot start"),
    ],
    ids=str,
)
def test_the_command_line_says_it_too(
    say: Callable, tiny: Any, tmp_path: Path, start_process: Callable[..., Any], found: dict[str, str], what: str
) -> None:
    say(found)
    process = start_process("remap_cli", "distill", *tiny.arguments(), f"--output={tmp_path / 'run'}")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2 and what in errors and "Traceback" not in errors, errors
    assert not (tmp_path / "run").exists()
