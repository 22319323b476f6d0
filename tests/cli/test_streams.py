"""Standard streams that are closed, full, or no longer read."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["recipes", "show", "digits"]])
def test_a_closed_pipe_is_no_traceback(words: list[str]) -> None:
    """What `remap methods | head -1` leads to, once head has left."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "remap_cli", *words], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert done.stderr == "" and done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["--help"]])
def test_results_that_cannot_be_written_are_an_error(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "remap_cli", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to stdout: No space left on device\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("word", "code"), [("methods", 0), ("nothing", 2)])
def test_a_stream_that_the_caller_closed_is_missed_by_nobody(word: str, code: int, closed: str) -> None:
    done = subprocess.run(
        f"{sys.executable} -m remap_cli {word} {closed}", shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0 and ">&-" not in closed.replace("2>&-", ""))


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """What a library prints would go into it: here, into a checkpoint."""
    code = "import remap_cli, os; print(os.open('/dev/zero', os.O_RDONLY) > 2, file=open('/dev/fd/9', 'w'))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" 9>&1 <&- >&- 2>&-', shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n"
