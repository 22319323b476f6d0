"""Standard streams that are closed, full, or no longer read."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

# Lines, bars where there is a terminal, and an end: well, by a mistake of the user's, by a bug.
WORKS = """
import os, time
from remap.errors import RemapError
from remap_cli import console
from remap_cli.app import app
from remap_cli.main import main

@app.command("work")
def work() -> None:
    with console.Reporter() as progress, progress.wait("work", 20) as step:
        os.write(1, b"ready\\n")  # past the bars
        for _ in range(20):
            time.sleep(0.02)
            progress.say("a line")
            step.advance()
    END

main()
"""
ENDS = {"print('done')": 0, "raise RemapError('a mistake')": 2, "raise ValueError('a bug')": 1}


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
    assert (done.stderr, done.returncode) == ("", 1)


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["--help"]])
def test_results_that_cannot_be_written_are_an_error(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "remap_cli", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to stdout: No space left on device\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C"}]
)
@pytest.mark.parametrize(("end", "code"), [(r"console.table('\u043a', ['\u043a'], [['\u043a\u043e\u0442']])", 0),
                                           (r"raise RemapError('\u043a\u043e\u0442')", 2)])  # fmt: skip
def test_letters_that_the_output_cannot_show_are_escaped(environment: dict[str, str], end: str, code: int) -> None:
    """Names in an alphabet that the encoding lacks, in a result, in a line of progress and in an error."""
    script = WORKS.replace("END", end).replace("a line", r"\u043a\u043e\u0442").replace("range(20)", "range(1)")
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} | environment
    words = [sys.executable, "-c", script, "work"]
    done = subprocess.run(words, capture_output=True, check=False, env=environment)
    assert done.returncode == code and b"Traceback" not in done.stderr
    shown = rb"\u043a\u043e\u0442"
    assert shown in done.stderr and (code or shown in done.stdout)
    assert code or b"\n ---\n" in done.stdout, "the rule of a table is in letters that can be shown"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("word", "code"), [("methods", 0), ("nothing", 2)])
def test_a_stream_that_the_caller_closed_is_no_traceback(word: str, code: int, closed: str) -> None:
    done = _under_shell(closed, "-m", "remap_cli", word)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0 and ">&-" not in closed.replace("2>&-", ""))


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """What a library prints would go into it: here, into a checkpoint."""
    code = (
        "import os; from remap_cli import main; main._open_streams();"
        "print(os.open('/dev/zero', os.O_RDONLY) > 2, file=open('/dev/fd/9', 'w'))"
    )
    assert _under_shell("9>&1 <&- >&- 2>&-", "-c", code).stdout == "True\n"


def _under_shell(closed: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with these words as they are; the shell reads only the redirections, which stand in this file."""
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("log", ["full", "pipe", "terminal"])
@pytest.mark.parametrize(("end", "code"), ENDS.items())
def test_a_log_that_cannot_be_written_changes_nothing(log: str, end: str, code: int) -> None:
    """A full disk, a reader that leaves (`2>&1 | head`), a terminal that is closed while bars are drawn."""
    opened = {"full": lambda: (None, os.open("/dev/full", os.O_WRONLY)), "pipe": os.pipe, "terminal": pty.openpty}
    reader, writer = opened[log]()
    words = [sys.executable, "-c", WORKS.replace("END", end), "work"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert process.stdout.readline() == "ready\n"
    if reader is not None:
        os.close(reader)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, "done\n" if code == 0 else "")


@pytest.mark.parametrize("words", [["nothing"], ["distill", "--method", "vpt_dep"]])
def test_a_mistake_that_cannot_be_told_keeps_its_exit_code(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "remap_cli", *words], stderr=full, check=False)
    assert done.returncode == 2


@pytest.mark.slow
def test_a_run_outlives_its_log(pictures: Path, tiny: list[str], tmp_path: Path) -> None:
    """In two processes, of which the first writes where the command does."""
    words = ["tune", "--data", str(pictures), *tiny, "--method", "linear", "--output", str(tmp_path / "r")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "remap_cli", *words, "--devices=2", "--json"],
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
        )
    assert done.returncode == 0 and json.loads(done.stdout)["processes"] == 2
    assert json.loads((tmp_path / "r" / "status.json").read_text())["status"] == "done"
